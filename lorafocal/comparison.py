"""What an objective compares: a pack's pairs under the policy and, where it asks for one, under the reference."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack
from lorafocal.data.tokens import TokenizedPair
from lorafocal.objectives import Objective, OtherAnswers, PairInputs, PairLogps, PairLosses
from lorafocal.objectives.inputs import mapped
from lorafocal.policy import evaluating, of_pairs, sequence_logps, sums_of, token_logps
from lorafocal.reference import Reference, build_reference
from lorafocal.whole_step import Share, shared_out

# Keeps a rank with fewer packs in step; its weight is 0.
FILLER = TokenizedPair("\0filler", [0], [0], [0], reference=(0.0, 0.0))


def is_filler(pack: Pack) -> bool:
    return pack.pair_ids == (FILLER.id,)


class Part(NamedTuple):
    """A pack of a step; `share` is what a loss over the whole step says of it."""

    pack: Pack
    share: Share | None = None


class Step(NamedTuple):
    """This rank's packs of one optimiser step, the pairs that it has over all ranks, and the state it leaves."""

    parts: tuple[Part, ...]
    pairs: int
    state: Mapping[str, Tensor]


class Seen(NamedTuple):
    """A pack's B pairs under both models: as the objective is told of them, and their log-probs as they are."""

    inputs: PairInputs
    policy: PairLogps
    reference: PairLogps | None


class Compared(NamedTuple):
    """A pack's B pairs: their losses, and their log-probs under both models. A filler's losses are zeros."""

    losses: PairLosses
    policy: PairLogps
    reference: PairLogps | None


class Comparison:
    """Scores packs for an objective. Every rank calls it equally often, fillers included.

    `kind` is the reference's (`reference.REFERENCES`), None for an objective without one; `ref_model` may be exchanged
    for what an engine holds in its place. `noisy`: dropout is allowed. It is the policy's alone: the reference never
    changes, in no layer. `seed` is that of an objective's draws, `state` what the steps so far have left to it.
    """

    def __init__(
        self, objective: Objective, kind: str | None, ref_model: nn.Module | None, *, noisy: bool, seed: int = 0
    ) -> None:
        self.objective, self.kind, self.ref_model, self.noisy, self.seed = objective, kind, ref_model, noisy, seed
        self.state: Mapping[str, Tensor] = {}
        self._number = 0
        self._built: tuple[nn.Module, nn.Module | None, Reference] | None = None

    @torch.no_grad()
    def step(self, model: nn.Module, packs: Sequence[Pack], pairs: int, number: int = 0) -> Step:
        """Step `number`, of `pairs` over all ranks and `packs` here: after a pass of its own where one is needed.

        `state` stays as it is until the caller takes up the step's.
        """
        self._number = number
        if not self.objective.entry.whole_step:
            return Step(tuple(map(Part, packs)), pairs, self.state)
        seen = [self.seen(model, pack).inputs for pack in packs]
        real = [inputs for inputs, pack in zip(seen, packs, strict=True) if not is_filler(pack)]
        shares, state = shared_out(self.objective, real or [_none_of(seen[0])], self.state)
        found = iter(shares)
        parts = [Part(pack, None if is_filler(pack) else next(found)) for pack in packs]
        return Step(tuple(parts), pairs, state)

    def __call__(self, model: nn.Module, part: Part) -> Compared:
        """The losses of a pack's pairs, and what they are made of."""
        pack, share = part
        if share is not None:
            sums = sums_of(token_logps(model, pack), pack)
            policy = of_pairs(sums, pack)
            return Compared(share.losses_of(policy, sums[2 * pack.num_pairs :]), policy, share.inputs.reference)
        inputs, policy, reference = self.seen(model, pack)
        if is_filler(pack):
            nothing = torch.zeros_like(policy.chosen).detach()
            return Compared(PairLosses(nothing, nothing, nothing), policy, reference)
        return Compared(self.objective.of(inputs, self.state), policy, reference)

    def seen(self, model: nn.Module, pack: Pack) -> Seen:
        """What the objective asks for of a pack: under the policy `model`, as it is called in training, and beside it.

        Where it weighs tokens, the log-probs that it is told are sums of weighted ones, under both models.
        """
        entry, index = self.objective.entry, pack.index
        reference = self._reference(model, pack)
        collisions = _room(pack) if entry.collisions else None
        tokens = token_logps(model, pack, collisions)
        sums = told = sums_of(tokens, pack)
        before = None if reference is None else reference.to(tokens.dtype)  # stored ones are wider
        weighs = self.objective.token_weights
        sums_before = told_before = before if before is None or weighs is None else sums_of(before, pack)
        if weighs is not None:
            weights = weighs(
                tokens.detach(), reference_tokens=before, sequence=index.sequence, lengths=index.lengths, pack=pack
            )
            told = sums_of(tokens * weights, pack)
            told_before = None if before is None else sums_of(before * weights, pack)
        inputs = PairInputs(
            policy=of_pairs(told, pack),
            reference=None if told_before is None else of_pairs(told_before, pack),
            lengths=index.lengths[: 2 * pack.num_pairs],
            scores=pack.scores,
            collisions=None if collisions is None else sums_of(collisions, pack)[: 2 * pack.num_pairs],
            others=_others(pack, told, told_before) if entry.others else None,
            groups=pack.groups if entry.groups else None,
            embeddings=pack.embeddings if entry.embeddings else None,
            draws=self._draws(pack) if entry.draws else None,
        )
        return Seen(inputs, of_pairs(sums, pack), None if sums_before is None else of_pairs(sums_before, pack))

    def _draws(self, pack: Pack) -> Tensor:
        """A random number a pair, (B,) float64, by seed, step and the pair's id."""
        drawn = [random.Random(f"lorafocal draw {self.seed} {self._number} {pair}").random() for pair in pack.pair_ids]
        return torch.tensor(drawn, dtype=torch.float64, device=pack.input_ids.device)

    def _reference(self, model: nn.Module, pack: Pack) -> Tensor | None:
        """Of tokens, (N,), where the objective weighs them, and else of whole answers, (2B + M,)."""
        if self.kind is None:
            return None
        with evaluating(model) if self.noisy else nullcontext():
            reference = self._reference_of(model)
            return reference.token_logps(pack) if self.objective.token_weights else reference.sums(pack)

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


def _room(pack: Pack) -> Tensor:
    """For a number a completion token, (N,)."""
    return torch.empty(len(pack.index.labels), dtype=torch.float64, device=pack.input_ids.device)


def _others(pack: Pack, sums: Tensor, reference: Tensor | None) -> OtherAnswers | None:
    if pack.others is None:
        return None
    behind = slice(2 * pack.num_pairs, None)
    before = None if reference is None else reference[behind]
    return OtherAnswers(sums[behind], before, pack.others.pair, pack.index.lengths[behind], pack.others.scores)


def _none_of(inputs: PairInputs) -> PairInputs:
    """No pairs, of the same kind: what a rank without any brings to a step."""
    return mapped(inputs, lambda tensor: tensor[:0])
