"""Objectives that see all pairs of a step at once: a step's packs put together over all ranks, and shared out again.

Such a loss is a function of the step's log-probs alone. They are computed in a first pass without gradients; its slopes
towards each of them are what the second pass, pack by pack, is differentiated with. So packs and ranks change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorafocal.gathered import all_pairs
from lorafocal.objectives import Objective, PairInputs, PairLogps, PairLosses
from lorafocal.objectives.inputs import joined


class Share(NamedTuple):
    """What a loss over the whole step says of one pack's B pairs and M further answers; all of it detached."""

    inputs: PairInputs
    losses: PairLosses
    slopes: PairLogps  # (B,) each: of the step's summed loss towards the policy's log-probs
    slopes_of_others: Tensor | None = None  # (M,)

    def losses_of(self, policy: PairLogps, others: Tensor | None = None) -> PairLosses:
        """These losses, differentiable towards the same log-probs of a second pass: (B,) each, and (M,)."""
        moves = sum(slope.to(side) * (side - side.detach()) for side, slope in zip(policy, self.slopes, strict=True))
        losses = self.losses.losses.to(policy.chosen) + moves
        if others is not None and self.inputs.others is not None and self.slopes_of_others is not None:
            moves_of_others = self.slopes_of_others.to(others) * (others - others.detach())
            losses = losses.index_add(0, self.inputs.others.pair, moves_of_others)
        return self.losses._replace(losses=losses)


def no_share(inputs: PairInputs) -> Share:
    """Of a pack that is no part of the step."""
    nothing = torch.zeros_like(inputs.policy.chosen)
    return Share(inputs, PairLosses(nothing, nothing, nothing), PairLogps(nothing, nothing))


def shared_out(
    objective: Objective,
    packs: Sequence[PairInputs],
    state: Mapping[str, Tensor],
    device: torch.device,
    num_groups: int | None = None,
) -> tuple[list[Share], Mapping[str, Tensor]]:
    """Collective: a share for each of this rank's packs, and the state that the step leaves; a rank may have none.

    The objective is computed on every rank, of the same numbers in the same order: in float64.
    """
    step = all_pairs(joined(packs) if packs else None, num_groups, device)
    leaves, others = PairLogps(*map(_leaf, step.inputs.policy)), step.inputs.others
    towards = [*leaves]
    if others is not None:
        others = others._replace(logps=_leaf(others.logps))
        towards.append(others.logps)
    with torch.enable_grad():
        losses = objective.of(replace(step.inputs, policy=leaves, others=others), state)
        found = torch.autograd.grad(losses.losses.sum(), towards, allow_unused=True)
    slopes = [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(towards, found, strict=True)]
    first, first_answer = step.first_pair, step.first_answer
    shares = []
    for pack in packs:
        pairs = slice(first, first := first + len(pack.policy.chosen))
        answers = slice(first_answer, first_answer := first_answer + _answers(pack))
        of_others = slopes[2][answers] if len(slopes) > 2 else None
        shares.append(Share(pack, _part(losses, pairs), PairLogps(slopes[0][pairs], slopes[1][pairs]), of_others))
    return shares, {name: value.detach() for name, value in (losses.state or {}).items()}


def _leaf(logps: Tensor) -> Tensor:
    return logps.detach().clone().requires_grad_()


def _answers(pack: PairInputs) -> int:
    return 0 if pack.others is None else len(pack.others.logps)


def _part(losses: PairLosses, pairs: slice) -> PairLosses:
    """What is said of some of the pairs, detached."""
    return PairLosses(
        losses.losses[pairs].detach(),
        losses.chosen_rewards[pairs],
        losses.rejected_rewards[pairs],
        None if losses.log_odds is None else losses.log_odds[pairs],
        tuple(constant[pairs] for constant in losses.constants),
        scale=None if losses.scale is None else losses.scale[pairs],
    )
