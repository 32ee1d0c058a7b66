"""What an objective compares: a pack's pairs under the policy and, where it asks for one, under the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack
from lorafocal.data.tokens import TokenizedPair
from lorafocal.metrics import summed_over_ranks
from lorafocal.objectives import Objective, PairLogps, PairLosses
from lorafocal.policy import colliding_logps, evaluating, sequence_logps
from lorafocal.reference import Reference, build_reference

# Keeps a rank with fewer packs in step; its weight is 0.
FILLER = TokenizedPair("\0filler", [0], [0], [0], score_chosen=1.0, score_rejected=0.0, reference=(0.0, 0.0))


def is_filler(pack: Pack) -> bool:
    return pack.pair_ids == (FILLER.id,)


class StepTotals(NamedTuple):
    """What is known of a whole step, over all ranks, before the loss of its first pack."""

    pairs: int
    statistics: Tensor | None  # (K,) means over its pairs, where the objective asks for some


class Logps(NamedTuple):
    """A pack's B pairs under both models; `collisions` (2B,) of the policy, for an objective that asks for them."""

    policy: PairLogps
    reference: PairLogps | None
    collisions: Tensor | None


class Compared(NamedTuple):
    """A pack's B pairs: their losses, and their log-probs under both models."""

    losses: PairLosses
    policy: PairLogps
    reference: PairLogps | None


class Comparison:
    """Scores packs for an objective. Every rank calls it equally often, fillers included.

    `kind` is the reference's (`reference.REFERENCES`), None for an objective without one; `ref_model` may be exchanged
    for what an engine holds in its place. `noisy`: dropout is allowed. It is the policy's alone: the reference never
    changes, in no layer.
    """

    def __init__(self, objective: Objective, kind: str | None, ref_model: nn.Module | None, *, noisy: bool) -> None:
        self.objective, self.kind, self.ref_model, self.noisy = objective, kind, ref_model, noisy
        self._built: tuple[nn.Module, nn.Module | None, Reference] | None = None

    def logps(self, model: nn.Module, pack: Pack) -> Logps:
        """Log-probs under the policy `model`, as it is called in training, and under the reference."""
        reference = self._reference(model, pack)
        policy, collisions = (
            colliding_logps(model, pack) if self.objective.entry.collisions else (sequence_logps(model, pack), None)
        )
        if reference is not None:
            reference = PairLogps(*(side.to(policy.chosen.dtype) for side in reference))  # stored ones are wider
        return Logps(policy, reference, collisions)

    def __call__(self, model: nn.Module, pack: Pack, step: StepTotals) -> Compared:
        """The losses of a pack's pairs, and what they are made of."""
        policy, reference, collisions = self.logps(model, pack)
        lengths, statistics = pack.index.lengths, step.statistics
        beside: dict[str, Any] = {"scores": pack.scores, "statistics": statistics, "collisions": collisions}
        return Compared(self.objective(policy, reference, lengths, **beside), policy, reference)

    @torch.no_grad()
    def totals(self, model: nn.Module, packs: Sequence[Pack], pairs: int) -> StepTotals:
        """Of a step of `pairs` over all ranks, whose share here is `packs`: a pass of its own where one is needed."""
        if self.objective.statistics is None:
            return StepTotals(pairs, None)
        sums = torch.stack([self._sums(model, pack) * (not is_filler(pack)) for pack in packs]).sum(0)
        return StepTotals(pairs, summed_over_ranks(sums) / pairs)

    def _sums(self, model: nn.Module, pack: Pack) -> Tensor:
        policy, reference, _ = self.logps(model, pack)
        return self.objective.statistics(policy, reference)  # type: ignore[misc, arg-type]  # both are there: it asks

    def _reference(self, model: nn.Module, pack: Pack) -> PairLogps | None:
        if self.kind is None:
            return None
        with evaluating(model) if self.noisy else nullcontext():
            return self._reference_of(model).logps(pack)

    def without_noise(self, model: nn.Module, pack: Pack, policy: PairLogps) -> PairLogps:
        """What the identity probe looks at: `policy`, or a pass without dropout."""
        if not self.noisy:
            return policy
        with evaluating(model), torch.no_grad():
            return sequence_logps(model, pack)

    def _reference_of(self, model: nn.Module) -> Reference:
        """An engine wraps policy and reference model when training begins."""
        if self._built is None or self._built[0] is not model or self._built[1] is not self.ref_model:
            self._built = model, self.ref_model, build_reference(self.kind, model, self.ref_model)
        return self._built[2]
