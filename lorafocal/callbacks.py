"""Small duties of a training run: at its start, at the start of an epoch, and between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from lorafocal.evaluations import drop_later
from lorafocal.model.moving import move


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch, from the step count: `set_epoch` does not reach a plain loader's batch sampler."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = kwargs["train_dataloader"].batch_sampler
        sampler.epoch = state.global_step // len(sampler)


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

    So is one of step 0, unless it was made just before.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._training = self._measured = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measured |= not self._training and state.global_step == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_later(self._run, state.global_step, keep_first=self._measured)
        self._training, self._measured = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
