"""Stops a run at the first number that is not finite, or when nothing or the reverse is learned, and says why."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafocal import launch
from lorafocal.data.held_out import write_held_out
from lorafocal.data.tokens import TokenizedPair
from lorafocal.engines import Engine
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.objectives import Objective
from lorafocal.together import anywhere

logger = logging.getLogger(__name__)

TURNED_WARNING, TURNED_LIMIT = 0.001, 0.05
"""Shares of the first step's pairs that a focal factor may push the wrong way: without a word, and at all."""


class HealthCheck(TrainerCallback):
    """Checks log-probs and losses a pack, gradients a step, and that the first real step moved what is trained."""

    def __init__(
        self, engine: Engine, parameters: dict[str, nn.Parameter], pairs: list[TokenizedPair], folder: Path
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._pairs = {pair.id: pair for pair in pairs}
        self._folder = folder
        self._step_ids: list[str] = []
        self._before: list[Tensor] | None = None
        self.moved = False  # whether a step has changed the trained weights in this process

    def see_pack(self, losses: Tensor, pair_ids: tuple[str, ...], step: int) -> None:
        """Raise UnhealthyRun where a pair's loss, (B,), is not finite, before any gradient is taken."""
        self._step_ids += pair_ids
        finite = torch.isfinite(losses.detach())
        if not finite.all():
            bad = [pair for pair, ok in zip(pair_ids, finite.tolist(), strict=True) if not ok]
            self._stop(f"the loss of {len(bad)} of {len(pair_ids)} pairs is not finite", bad, step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.forget_step()

    def forget_step(self) -> None:
        """The packs of this step begin, or begin again."""
        self._step_ids = []

    def check_gradients(self, step: int) -> None:
        """Every trained tensor has a gradient, and every one is finite; all ranks ask, before the weights change."""
        if without := self._engine.ungraded(self._parameters):
            raise UnhealthyRun(
                f"{len(without)} of {len(self._parameters)} trained tensors received no gradient (first: {without[0]}):"
                " they would never learn. Activation checkpointing with frozen embeddings is a known cause; use"
                " `activation_checkpointing: true` of lorafocal, or none"
            )
        norm = self._engine.largest_norm(self._parameters)
        if not math.isfinite(norm):
            self._stop("the gradient is not finite", self._step_ids, step)
        still = norm == 0  # pairs beyond the target of a hinge, or clipped by a guard, give none
        self._before = None if self.moved or still else self._samples()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step with a gradient and a learning rate above 0 must change at least one trained tensor."""
        if self._before is None:
            return
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        if max(rates) > 0:
            still = all(torch.equal(before, now) for before, now in zip(self._before, self._samples(), strict=True))
            self._before = None
            if not anywhere(not still, args.device):
                raise UnhealthyRun(
                    f"no trained weight moved at step {state.global_step + 1} with learning rate {max(rates):g}: the"
                    " optimiser does not hold the trained parameters, or the rate is too small for their precision"
                )
            self.moved = True

    def _samples(self) -> list[Tensor]:
        return [self._engine.sample(parameter) for parameter in self._parameters.values()]

    def _stop(self, what: str, pair_ids: list[str], step: int) -> None:
        who = "" if launch.world_size() == 1 else f"-rank-{launch.rank()}"
        replay = self._folder / f"nonfinite-step-{step + 1}{who}.jsonl"
        write_held_out(replay, [self._pairs[pair] for pair in pair_ids if pair in self._pairs])
        shown = ", ".join(pair_ids[:5]) + (f" and {len(pair_ids) - 5} more" if len(pair_ids) > 5 else "")
        raise UnhealthyRun(
            f"step {step + 1} was stopped before it changed anything: {what} (pairs: {shown}). Their tokens are in"
            f" {replay.name} in the run folder; checkpoints are untouched. Look at these pairs, lower the learning"
            " rate, or train in float32"
        )


def check_first_step(objective: Objective, turned_share: float) -> None:
    """Warn where `objective`'s factor turns the gradient of some pairs of the first step round, before it is taken.

    Where a loss starts at log-odds of 0 there are none, but others start anywhere. Raises InputError where there are
    too many, unless objective.guard takes their gradients away.
    """
    if objective.factor is None or turned_share <= TURNED_WARNING:
        return
    told = (
        f"{turned_share:.1%} of the first step's pairs lie where the factor p^gamma of {objective.name} turns the"
        f" gradient round (gamma {objective.factor.gamma:g}: log-odds below {objective.turning_point:.4g})"
    )
    if objective.guard:
        logger.warning("%s; objective.guard: %s leaves them without one", told, objective.guard)
        return
    ways = "use a smaller gamma, a smaller objective.beta, or objective.guard: clip, which leaves such pairs out"
    if turned_share > TURNED_LIMIT:
        raise InputError(f"{told}: it would be taken the wrong way. No weight has changed; {ways}")
    logger.warning("%s: it takes them the wrong way; %s", told, ways)
