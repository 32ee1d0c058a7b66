"""What a person and a program see of a run: one status line, and `metrics.jsonl` beside it."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafocal.publish import write_atomically

_WINDOW_STEPS = 20


class MetricsFile(TrainerCallback):
    """Appends one JSON object a logged event to `path`: the logged keys, `epoch` and `step`, sorted.

    The file is the lineage of the weights: when training starts or resumes at step n, lines of later steps are
    dropped first. Numbers that are not finite become null, because JSON has no word for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`, and a last line that a killed process left unfinished."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if kept != lines:
            write_atomically(self.path, "".join(kept))

    def append(self, step: int, logs: Mapping[str, Any]) -> None:
        """Writes one line and flushes it, so that a reader follows the run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(metrics_line(step, logs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.rewind(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self.append(state.global_step, logs)


class StepClock:
    """Speed over the last 20 steps, in seconds of training only; `now` is a monotonic time in seconds."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOW_STEPS)
        self._since = 0.0

    def resume(self, now: float) -> None:
        """Training (re)starts now: the time since the last step (an evaluation, a save) is not counted."""
        self._since = now

    def step(self, pairs: float, now: float) -> None:
        """A step over `pairs` pairs has just ended."""
        self._steps.append((pairs, now - self._since))
        self._since = now

    @property
    def pairs_per_s(self) -> float | None:
        seconds = sum(step_s for _, step_s in self._steps)
        return sum(pairs for pairs, _ in self._steps) / seconds if seconds > 0 else None

    @property
    def step_s(self) -> float | None:
        """Mean seconds a step."""
        return sum(step_s for _, step_s in self._steps) / len(self._steps) if self._steps else None


class ProgressLine(TrainerCallback):
    """One status line: redrawn in place on a terminal, else a plain line a logged event; nothing if `quiet`.

    Speed and remaining time leave evaluation and saving out. The pairs of a step are `args.pairs_per_step`; once
    the trainer logs the cumulative `pairs_seen`, short steps are corrected by it.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.now = now
        self.clock = StepClock()
        self.logs: dict[str, Any] = {}
        self.drawn = False
