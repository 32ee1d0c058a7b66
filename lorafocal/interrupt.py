"""Ctrl-C and SIGTERM finish the optimiser step, save a checkpoint, and end the run in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Remembers a signal and asks the trainer to save and stop at the end of the step. A second one acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the two signals are ours; the handlers before are restored afterwards."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch cut short has not ended: its log, evaluation and checkpoint come when the resumed run ends it."""
        cut_short = state.global_step % len(kwargs["train_dataloader"]) and state.global_step < state.max_steps
        if self.received is not None and cut_short:
            control.should_log = control.should_evaluate = control.should_save = False
