"""Small duties of a training run: at its start, at the start of an epoch, and between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from lorafocal.errors import InputError
from lorafocal.evaluations import drop_later, evaluation_file
from lorafocal.model.moving import move
from lorafocal.progress import MetricsFile
from lorafocal.publish import write_atomically
from lorafocal.sampler import StepSampler
from lorafocal.saving import counted


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch, from the step count: `set_epoch` does not reach a plain loader's batch sampler."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises InputError for a loader that is not the trainer's."""
        loader = kwargs["train_dataloader"]
        if not isinstance(sampler := getattr(loader, "batch_sampler", None), StepSampler):
            raise InputError(
                f"get_train_dataloader gave a {type(loader).__name__} of another kind of batches: a batch here is a"
                " whole step of packed pairs. Return what `super().get_train_dataloader()` gives; rows are chosen by"
                " train_dataset, their order by keep_order"
            )
        sampler.epoch = state.global_step // len(sampler)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises InputError where a callback broke the epoch off: by steps it is the same one that begins again."""
        broken = control.should_epoch_stop and not control.should_training_stop
        if broken and state.global_step % len(kwargs["train_dataloader"]) and state.global_step < state.max_steps:
            raise InputError(
                f"a callback set control.should_epoch_stop after step {state.global_step}: epochs are counted by steps,"
                " so that resumed runs see the same pairs, and this one would begin again with the same; set"
                " control.should_training_stop, or train on fewer pairs"
            )


class OwnIntervals(TrainerCallback):
    """How often to log, evaluate and save is said by the arguments: a checkpoint's state would bring back its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class EvaluateFirst(TrainerCallback):
    """Where an epoch ends with a checkpoint, its evaluation comes first: a kill between the two would lose it."""

    def __init__(self) -> None:
        self._evaluated = -1  # after this step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = not state.global_step % len(kwargs["train_dataloader"])
        due = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
        if control.should_save and ends_epoch and due:
            control.should_evaluate, self._evaluated = True, state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._evaluated:
            control.should_evaluate = False


class MoveReference(TrainerCallback):
    """After every so many optimiser steps the reference follows the policy; checkpoints come after it."""

    def __init__(self, trainer: Trainer, *, every: int, mixing: float) -> None:
        self._trainer, self._every, self._mixing = trainer, every, mixing

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            move(self._trainer.model, self._mixing)


def following(trainer: Trainer) -> tuple[TrainerCallback, ...]:
    """What moves the reference of `trainer`, where it moves."""
    strategy = trainer.args.strategy
    if strategy.kind != "moving":
        return ()
    return (MoveReference(trainer, every=strategy.every, mixing=strategy.mixing),)


class ForgetLaterEvaluations(TrainerCallback):
    """Where training starts or resumes at step n, evaluations of later steps are those of weights that are gone.

    So is one of step 0, unless it was made just before. They go when the first step has ended, which may be refused.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._begun: int | None = None  # the step at which a training began that has not made one yet
        self._measured = False  # at step 0
        self._before: tuple[bool, bytes | None] = False, None  # that, and the table of step 0, before the training

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measured |= state.global_step == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._begun = state.global_step
            self._before = self._measured, self._first.read_bytes() if self._first.exists() else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begun is not None:
            drop_later(self._run, self._begun, keep_first=self._measured)
        self._begun, self._measured = None, False

    on_train_end = on_step_end

    def called_off(self) -> None:
        """The training ended before its first step did: the tables are those of before."""
        if self._begun is None:
            return
        self._measured, table = self._before
        if table is not None:
            write_atomically(self._first, table)
        else:
            self._first.unlink(missing_ok=True)
        self._begun = None

    @property
    def _first(self) -> Path:
        return evaluation_file(self._run, 0)


@contextmanager
def counted_anew(trainer: Any) -> Iterator[None]:
    """Within, `trainer` trains and counts from 0, beside what earlier trainings have done to the same weights.

    A training that ends before its first step did, as where that is refused or finds no memory, has not been: counts,
    log and files are those of before. One that has taken up a checkpoint keeps the checkpoint's counts.
    """
    made = trainer.made
    before = trainer.state, trainer.pairs_seen, copy(trainer.metrics), trainer.compared.state, made.earlier
    made.earlier = counted(made.earlier, steps=trainer.state.global_step, pairs_seen=trainer.pairs_seen)
    trainer.metrics.reset()  # on every rank: what an earlier call left is not of this one
    trainer.pairs_seen, trainer.compared.state = 0, {}
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, (MetricsFile, ForgetLaterEvaluations)):
                callback.called_off()
        if 0 in (trainer.state.global_step, trainer.pairs_seen):  # the latter where a checkpoint was not taken up
            trainer.state, trainer.pairs_seen, trainer.metrics, trainer.compared.state, made.earlier = before
        raise
