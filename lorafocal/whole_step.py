"""Objectives that see all pairs of a step at once: a step's packs put together over all ranks, and shared out again.

Such a loss is a function of the step's log-probs alone. They are computed in a first pass without gradients; its slopes
towards each of them are what the second pass, pack by pack, is differentiated with. So packs and ranks change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorafocal.objectives import Objective, PairInputs, PairLogps, PairLosses
from lorafocal.objectives.inputs import joined, mapped


class Share(NamedTuple):
    """What a loss over the whole step says of one pack's B pairs and M further answers; all of it detached."""

    inputs: PairInputs
    losses: PairLosses
    slopes: PairLogps  # (B,) each: of the step's summed loss towards the policy's log-probs
    slopes_of_others: Tensor | None  # (M,)

    def losses_of(self, policy: PairLogps, others: Tensor | None) -> PairLosses:
        """These losses, differentiable towards the same log-probs of a second pass: (B,) each, and (M,)."""
        moves = sum(slope.to(side) * (side - side.detach()) for side, slope in zip(policy, self.slopes, strict=True))
        losses = self.losses.losses + moves
        if others is not None and self.slopes_of_others is not None and len(others):
            extra = (self.slopes_of_others.to(others) * (others - others.detach())).sum()
            losses = torch.cat((losses[:1] + extra, losses[1:]))  # whose pair it is makes no difference to the sum
        return self.losses._replace(losses=losses)


def shared_out(
    objective: Objective, packs: Sequence[PairInputs], state: Mapping[str, Tensor]
) -> tuple[list[Share], Mapping[str, Tensor]]:
    """A share for each of this rank's packs, and the state that the step leaves; every rank must call.

    A rank without pairs gives one part of none.
    """
    ours = joined([_detached(pack) for pack in packs])
    whole = mapped(ours, rows_of_all_ranks)
    if ours.others is not None:
        before = sum(counts_of_all_ranks(len(ours.policy.chosen))[: _rank()])
        moved = rows_of_all_ranks(ours.others.pair + before)
        whole = _replaced(whole, others=whole.others._replace(pair=moved))  # type: ignore[union-attr]
    leaves = PairLogps(*(side.clone().requires_grad_() for side in whole.policy))
    others = None if whole.others is None else whole.others.logps.clone().requires_grad_()
    asked = _replaced(whole, policy=leaves)
    if others is not None:
        asked = _replaced(asked, others=whole.others._replace(logps=others))  # type: ignore[union-attr]
    with torch.enable_grad():
        losses = objective.of(asked, state)
        towards = [*leaves, *([] if others is None else [others])]
        found = torch.autograd.grad(losses.losses.sum(), towards, allow_unused=True)
    slopes = [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(towards, found, strict=True)]
    return _shares(packs, losses, slopes), losses.state or {}


def _shares(packs: Sequence[PairInputs], losses: PairLosses, slopes: Sequence[Tensor]) -> list[Share]:
    """This rank's part of the step, pack by pack."""
    pairs = [len(pack.policy.chosen) for pack in packs]
    answers = [0 if pack.others is None else len(pack.others.logps) for pack in packs]
    first = sum(counts_of_all_ranks(sum(pairs))[: _rank()])
    first_other = sum(counts_of_all_ranks(sum(answers))[: _rank()]) if len(slopes) > 2 else 0
    shares = []
    for pack, count, others in zip(packs, pairs, answers, strict=True):
        own, of_others = slice(first, first + count), slice(first_other, first_other + others)
        shares.append(
            Share(
                pack,
                PairLosses(
                    losses.losses[own].detach(),
                    losses.chosen_rewards[own],
                    losses.rejected_rewards[own],
                    None if losses.log_odds is None else losses.log_odds[own],
                    tuple(constant[own] for constant in losses.constants),
                ),
                PairLogps(slopes[0][own], slopes[1][own]),
                slopes[2][of_others] if len(slopes) > 2 else None,
            )
        )
        first, first_other = first + count, first_other + others
    return shares


def _detached(inputs: PairInputs) -> PairInputs:
    return mapped(inputs, Tensor.detach)


def _replaced(inputs: PairInputs, **changes: object) -> PairInputs:
    return PairInputs(policy=changes.pop("policy", inputs.policy), **{**inputs.asked(), **changes})  # type: ignore[arg-type]


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def counts_of_all_ranks(count: int) -> list[int]:
    """Collective: each rank's count, by rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [count]
    found: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, count)
    return [number or 0 for number in found]


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Collective: the rows of all ranks, (n, ...) each of its own n, behind one another by rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = counts_of_all_ranks(len(rows))
    slots = rows.new_zeros((max(counts), *rows.shape[1:]))
    slots[: len(rows)] = rows
    gathered = [torch.empty_like(slots) for _ in counts]
    dist.all_gather(gathered, slots)
    return torch.cat([slot[:count] for slot, count in zip(gathered, counts, strict=True)])
