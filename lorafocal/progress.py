"""What a person and a program see of a run: one status line, and `metrics.jsonl` beside it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from lorafocal import launch
from lorafocal.metrics import loss_gaps
from lorafocal.publish import write_atomically
from lorafocal.run_folder import METRICS_FILE

_WINDOW = 20
_CLEAR_LINE = "\r\x1b[2K"
_SUMMARY = '"train_runtime"'  # of the line that transformers logs when a call to train ends, by a signal too
_NOBODY_READS = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class MetricsFile(TrainerCallback):
    """Appends one JSON object a logged event to the metrics of a run: the logged keys, `epoch` and `step`, sorted.

    The file is the lineage of the weights: when training starts or resumes at step n, lines of later steps
    are dropped (at step 0, a fresh start, all but what was measured just before it). That waits, with what is logged
    meanwhile, for the end of the first step, which may be refused. Numbers that are not finite become null, because
    JSON has no word for them.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_FILE
        self._begun: int | None = None  # the step at which a training began that has not made one yet
        self._measured: list[Mapping[str, Any]] = []  # by evaluations at step 0, before training
        self._waiting: list[Mapping[str, Any]] = []

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`, a last line that a killed process left unfinished, and the summary of
        a call that did not end the run after all.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step > 0 and _step_of(line) <= step and _SUMMARY not in line]
        if kept != lines:
            write_atomically(self.path, "".join(kept))

    def append(self, step: int, logs: Mapping[str, Any]) -> None:
        """Writes one line and flushes it, so that a reader follows the run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(metrics_line(step, logs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._waiting = []
        if state.is_world_process_zero:
            self._begun = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._go_on()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._go_on()

    def called_off(self) -> None:
        """The training ended before its first step did: the lines are still those of the weights."""
        self._begun = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self._begun == state.global_step:
            self._waiting.append(dict(logs))
            return
        self._go_on()
        self.append(state.global_step, logs)
        if state.global_step == 0:
            self._measured.append(dict(logs))

    def _go_on(self) -> None:
        """Once in a training, from its first step's end on."""
        if self._begun is None:
            return
        self.rewind(self._begun)
        for logs in (*(() if self._begun else self._measured), *self._waiting):
            self.append(self._begun, logs)
        self._begun, self._measured = None, []


class LossWithEvaluation(TrainerCallback):
    """Logs the training loss with every evaluation too, so that the two stand side by side whatever the intervals.

    Held-out loss minus training loss is the gap that shows pairs being learned by heart from the second epoch on.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the step's checkpoint is written, which keeps what is not logged yet; an epoch ends only after it."""
        ends_epoch = not state.global_step % len(kwargs["train_dataloader"]) or state.global_step == state.max_steps
        if control.should_evaluate or (ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH):
            control.should_log = True


class StepClock:
    """Seconds of training, without what lies between steps (evaluation, saving); `now` is monotonic."""

    def __init__(self) -> None:
        self.trained_s = 0.0
        self._since = 0.0
        self._steps: deque[float] = deque(maxlen=_WINDOW)

    def resume(self, now: float) -> None:
        """Training (re)starts now: the time since the last step is not counted."""
        self._since = now

    def step(self, now: float) -> None:
        """An optimiser step has just ended; the next one begins."""
        self._steps.append(now - self._since)
        self.trained_s += now - self._since
        self._since = now

    @property
    def step_s(self) -> float | None:
        """Mean seconds a step over the last 20; None before the first."""
        return sum(self._steps) / len(self._steps) if self._steps else None


class Speed(TrainerCallback):
    """What the machine does: pairs a second of training, without evaluation and saving, and peak memory."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.clock = StepClock()
        self._logged: tuple[int, float] | None = None

    def measured(self, pairs_seen: int) -> dict[str, float]:
        """For a training log: `peak_gib` of this process, and `pairs_per_s` since the log before (none at the first).

        `pairs_seen` counts the pairs of all processes since the run began.
        """
        before, self._logged = self._logged, (pairs_seen, self.clock.trained_s)
        found = {"peak_gib": peak_gib()}
        if before is not None and self.clock.trained_s > before[1]:
            found["pairs_per_s"] = (pairs_seen - before[0]) / (self.clock.trained_s - before[1])
        return found

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.step(self.now())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._logged = None  # pairs are counted anew by each call
        self.clock.resume(self.now())

    def _resume(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.resume(self.now())

    on_log = on_evaluate = on_save = _resume


class ProgressLine(TrainerCallback):
    """One status line: redrawn in place on a terminal, else a plain line a logged event; nothing if `quiet`.

    Speed and remaining time leave evaluation and saving out. Pairs a second are those that were logged last, before
    that `args.pairs_per_step` by the time of a step.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream: TextIO | None = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.now = now
        self.clock = StepClock()
        self.logs: Mapping[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.resume(self.now())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.step(self.now())
        if self._in_place and self._shown(state):
            self._draw(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.logs = dict(logs)
            if self._shown(state):
                self._draw(args, state)
        elif logs and "eval_loss" in logs and self._shown(state):
            self._print(evaluation_line(state.global_step, state.max_steps, logs, gap=loss_gap(state.log_history)))
        self.clock.resume(self.now())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.resume(self.now())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.resume(self.now())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._in_place and self._shown(state):
            tell(self.stream, "\n")

    def say(self, line: str) -> None:
        """A line of its own, unless `quiet`: for what another callback has to tell. For rank 0 alone."""
        if not self.quiet:
            self._print(line)

    @property
    def _in_place(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def _shown(self, state: TrainerState) -> bool:
        return state.is_world_process_zero and not self.quiet

    def _pairs_per_s(self, args: TrainingArguments) -> float | None:
        if "pairs_per_s" in self.logs:
            return self.logs["pairs_per_s"]
        pairs_per_step = getattr(args, "pairs_per_step", None)
        return pairs_per_step / self.clock.step_s if pairs_per_step and self.clock.step_s else None

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        step_s = self.clock.step_s
        line = status_line(
            state.global_step,
            state.max_steps,
            pairs_per_s=self._pairs_per_s(args),
            eta_s=None if step_s is None else step_s * (state.max_steps - state.global_step),
            loss=self.logs.get("loss"),
            margin=self.logs.get("rewards/margins"),
            accuracy=self.logs.get("rewards/accuracies"),
            peak_gib=peak_gib(),
        )
        if self._in_place:
            tell(self.stream, _CLEAR_LINE + fitted(line, shutil.get_terminal_size().columns - 1))
        else:
            self._print(line)

    def _print(self, line: str) -> None:
        tell(self.stream, f"{_CLEAR_LINE if self._in_place else ''}{line}\n")


def beside_progress(trainer: Trainer) -> Callable[[str], None]:
    """Says lines of their own while `trainer` trains, above its status line and as quiet as that is."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressLine)).say


def speaker(quiet: bool) -> Callable[[str], None]:
    """Says lines on standard error, of all processes the first alone; nothing at all where it is to be `quiet`."""
    if quiet or not launch.is_main():
        return lambda line: None
    return lambda line: tell(sys.stderr, f"{line}\n")


def tell(stream: TextIO | None, text: str) -> None:
    """Writes `text` to whoever reads `stream`; where nobody does any more, it and all that follows go nowhere.

    What a run says is decoration: with its reader gone (a pipe to `head`, a lost terminal) it ends as it would have.
    """
    if stream is None:  # closed before the start
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in _NOBODY_READS:
            raise
        _send_nowhere(stream)


def _send_nowhere(stream: TextIO) -> None:
    """What is left in its buffer too, and what libraries write there."""
    with suppress(io.UnsupportedOperation):  # no file of the system
        handle = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, handle)
        os.close(nowhere)


def fitted(line: str, columns: int) -> str:
    """The line without its last fields where it is wider than the terminal: a number is never cut in two."""
    while len(line) > columns and " · " in line:
        line = line.rpartition(" · ")[0]
    return line[:columns]


def status_line(
    step: int,
    steps: int,
    *,
    pairs_per_s: float | None = None,
    eta_s: float | None = None,
    loss: float | None = None,
    margin: float | None = None,
    accuracy: float | None = None,
    peak_gib: float | None = None,
) -> str:
    """`step 37/100 · 12.3 pairs/s · ETA 0:12 · loss 0.6123 · margin +0.41 · acc 78% · 1.2 GiB`.

    What is unknown is left out. `margin` is the mean reward margin, `accuracy` a share in [0, 1], `peak_gib`
    the peak memory in GiB.
    """
    parts = [f"step {step}/{steps}"]
    if pairs_per_s is not None:
        parts.append(f"{pairs_per_s:.{0 if pairs_per_s >= 100 else 1}f} pairs/s")
    if eta_s is not None:
        parts.append(f"ETA {clock_text(eta_s)}")
    parts += _quality(loss, margin, accuracy)
    if peak_gib is not None:
        parts.append(f"{peak_gib:.1f} GiB")
    return " · ".join(parts)


def evaluation_line(step: int, steps: int, logs: Mapping[str, Any], *, gap: float | None = None) -> str:
    """`evaluation at step 50/100 · loss 0.6010 · margin +0.41 · acc 78% · gap +0.012` from the `eval_` keys of `logs`.

    `gap` is `loss_gap`'s.
    """
    keys = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    parts = [f"evaluation at step {step}/{steps}", *_quality(*(logs.get(key) for key in keys))]
    return " · ".join(parts if gap is None else [*parts, f"gap {gap:+.3f}"])


def loss_gap(history: Sequence[Mapping[str, Any]]) -> float | None:
    """`loss_gaps` at the last evaluation; None where there is none, or no training loss was logged before it."""
    gaps = [gap for _, gap in loss_gaps(history)]
    return gaps[-1] if gaps else None


def clock_text(seconds: float) -> str:
    """Seconds as `0:12` or `1:02:03`, rounded up."""
    minutes, second = divmod(max(0, math.ceil(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def peak_gib() -> float:
    """Peak memory of this process in GiB: CUDA's allocations where it made any, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized() and (peak := torch.cuda.max_memory_allocated()):
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def metrics_line(step: int, logs: Mapping[str, Any]) -> str:
    """One line of `metrics.jsonl`, with its newline."""
    values = {key: _json_number(value) for key, value in logs.items()}
    return json.dumps(values | {"step": step}, sort_keys=True, allow_nan=False) + "\n"


def _quality(loss: float | None, margin: float | None, accuracy: float | None) -> list[str]:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if margin is not None:
        parts.append(f"margin {margin:+.2f}")
    if accuracy is not None:
        parts.append(f"acc {accuracy:.0%}")
    return parts


def _json_number(value: Any) -> Any:
    """A logged value as JSON has it: numpy and torch scalars as numbers, NaN and infinity as null."""
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _step_of(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity for one that is not whole."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
