"""Ctrl-C, SIGTERM and SIGHUP finish the optimiser step, save a checkpoint, and end the run in good order.

Several processes may hear a signal at different moments, or one of them alone: they agree at the end of every step.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # its hook is registered by the import
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafocal.together import greatest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignal(TrainerCallback):
    """Remembers a signal and asks the trainer to save and stop at the end of the step. A second one acts at once.

    Not a second SIGHUP: of a connection that is lost the shell tells, and the system once more.

    `received` is what all processes have agreed on, None while the run goes on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._heard: signal.Signals | None = None

    @property
    def heard(self) -> signal.Signals | None:
        """What this process has heard, whether or not a step has ended since."""
        return self._heard

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the signals are ours; the handlers before are restored afterwards.

        A SIGHUP that is ignored remains so: that is what nohup asks for.
        Of two that watch one inside the other, as a run inside a sweep, each knows what the other has heard.
        In a thread of its own a run hears none: Python gives signals to the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        unheard = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS if number not in unheard}
        outer = getattr(before[signal.SIGINT], "__self__", None)
        if isinstance(outer, StopOnSignal):
            self._heard = outer._heard
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if isinstance(outer, StopOnSignal):
                outer._heard = self._heard

    def _hear(self, number: int, frame: Any) -> None:
        if self._heard is not None and number == signal.SIGHUP:
            return
        if self._heard is not None:
            raise KeyboardInterrupt
        self._heard = signal.Signals(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.received = agreed(self._heard, args.device)
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch cut short has not ended: its log, evaluation and checkpoint come when the resumed run ends it."""
        cut_short = state.global_step % len(kwargs["train_dataloader"]) and state.global_step < state.max_steps
        if self.received is not None and cut_short:
            control.should_log = control.should_evaluate = control.should_save = False


def agreed(heard: signal.Signals | None, device: torch.device) -> signal.Signals | None:
    """A signal that any process has heard (the largest number), or None; every process must call."""
    number = int(greatest(heard or 0, device))
    return signal.Signals(number) if number else None


def left_to_the_trainer(worker: int) -> None:
    """For data workers: launchers send a signal to them too, and a dead worker would end the step half-way."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit() -> None:
    """Whoever starts workers that ignore SIGTERM must end them otherwise: Python's exit sends it, and waits for them.

    Registered once, after multiprocessing's own hook, and so called before it.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each, in whatever ends the process
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
