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
from lorafocal.model.compiled import is_compiled, uncompiled
from lorafocal.objectives import Objective, OtherAnswers, PairInputs, PairLogps, PairLosses
from lorafocal.objectives.tokens import TokenInputs
from lorafocal.policy import compared_tokens, evaluating, of_pairs, sums_of, token_logps
from lorafocal.reference import Reference, build_guide, build_reference
from lorafocal.references.strategy import Strategy
from lorafocal.whole_step import Share, no_share, shared_out

# Keeps a rank with fewer packs in step; its weight is 0.
FILLER = TokenizedPair(
    "\0filler", [0], [0], [0], reference=(0.0, 0.0), reference_tokens=(torch.zeros(1), torch.zeros(1))
)


def is_filler(pack: Pack) -> bool:
    return pack.pair_ids == (FILLER.id,)


class Part(NamedTuple):
    """A pack of a step; `share` is what a loss over the whole step says of it."""

    pack: Pack
    share: Share | None = None
    place: int = 0  # among this rank's packs of the step


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
    for what an engine holds in its place; `strategy` says what else belongs to the kind. `noisy`: dropout is allowed.
    It is the policy's alone: the reference has none, in no layer. `seed` is that of an objective's draws and of the
    noise, `state` what the steps so far have left to it.
    """

    def __init__(
        self,
        objective: Objective,
        kind: str | None,
        ref_model: nn.Module | None,
        *,
        noisy: bool,
        seed: int = 0,
        rank: int = 0,
        num_groups: int | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.objective, self.kind, self.ref_model, self.noisy, self.seed = objective, kind, ref_model, noisy, seed
        self.rank, self.num_groups, self.strategy = rank, num_groups, strategy
        self.state: Mapping[str, Tensor] = {}
        self._number = 0
        self._guided: tuple[nn.Module, Reference] | None = None
        self._built: tuple[nn.Module, nn.Module | None, Reference] | None = None

    @torch.no_grad()
    def step(self, model: nn.Module, packs: Sequence[Pack], pairs: int, number: int = 0) -> Step:
        """Step `number`, of `pairs` over all ranks and `packs` here: after a pass of its own where one is needed.

        `state` stays as it is until the caller takes up the step's.
        """
        self._number = number
        if not self.objective.entry.whole_step:
            return Step(tuple(Part(pack, place=place) for place, pack in enumerate(packs)), pairs, self.state)
        seen = []
        for place, pack in enumerate(packs):
            self._settle_noise(model, place)
            seen.append(self.seen(model, pack).inputs)
        real = [inputs for inputs, pack in zip(seen, packs, strict=True) if not is_filler(pack)]
        device = packs[0].input_ids.device  # a rank without pairs has a filler
        shares, state = shared_out(self.objective, real, self.state, device, self.num_groups)
        found = iter(shares)
        parts = [
            Part(pack, no_share(inputs) if is_filler(pack) else next(found), place)
            for place, (inputs, pack) in enumerate(zip(seen, packs, strict=True))
        ]
        return Step(tuple(parts), pairs, state)

    def __call__(self, model: nn.Module, part: Part) -> Compared:
        """The losses of a pack's pairs, and what they are made of."""
        pack, share = part.pack, part.share
        self._settle_noise(model, part.place)
        if share is not None:  # of a filler too: every rank calls the models equally often
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

        Where it weighs tokens, the log-probs that it is told are sums of weighted ones, under all models.
        """
        entry, index = self.objective.entry, pack.index
        guide = self._guide(model, pack)
        collisions = _room(pack) if entry.collisions else None
        tokens, divergences, before = self._tokens(model, pack, collisions)
        draws = self._draws(pack) if entry.draws else None
        weigh = self.objective.token_weights
        sums, sums_before = sums_of(tokens, pack), before
        if before is not None and (weigh is not None or entry.divergences):  # it is of tokens then
            sums_before = sums_of(before, pack)
        told, told_before, told_guide = sums, sums_before, None if guide is None else sums_of(guide, pack)
        if weigh is not None:
            weights = weigh(tokens.detach(), **_token_inputs(pack, before, guide, draws).asked()).detach().to(tokens)
            told = sums_of(tokens * weights, pack)
            told_before, told_guide = (None if of is None else sums_of(of * weights, pack) for of in (before, guide))
        inputs = PairInputs(
            policy=of_pairs(told, pack),
            reference=None if told_before is None else of_pairs(told_before, pack),
            guide=None if told_guide is None else of_pairs(told_guide, pack),
            lengths=index.lengths[: 2 * pack.num_pairs],
            scores=pack.scores,
            collisions=None if collisions is None else sums_of(collisions, pack)[: 2 * pack.num_pairs],
            divergences=None if divergences is None else sums_of(divergences, pack)[: 2 * pack.num_pairs],
            others=_others(pack, told, told_before) if entry.others else None,
            groups=pack.groups if entry.groups else None,
            num_groups=self.num_groups if entry.groups else None,
            embeddings=pack.embeddings if entry.embeddings else None,
            draws=draws,
        )
        return Seen(inputs, of_pairs(sums, pack), None if sums_before is None else of_pairs(sums_before, pack))

    def _settle_noise(self, model: nn.Module, place: int) -> None:
        """Of each pack its own dropout, the same in a resumed run and in both passes of a step over it."""
        if self.noisy and model.training:
            name = f"lorafocal noise {self.seed} {self.rank} {self._number} {place}"
            torch.manual_seed(random.Random(name).getrandbits(63))

    def _draws(self, pack: Pack) -> Tensor:
        """A random number a pair, (B,) float64, by seed, step and the pair's id."""
        drawn = [random.Random(f"lorafocal draw {self.seed} {self._number} {pair}").random() for pair in pack.pair_ids]
        return torch.tensor(drawn, dtype=torch.float64, device=pack.input_ids.device)

    def _tokens(
        self, model: nn.Module, pack: Pack, collisions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs of tokens under the policy, (N,), their divergences where the objective asks, and the reference's.

        The last are `_reference`'s, but of tokens, (N,), beside divergences.
        """
        if self.objective.entry.divergences:
            with evaluating(model) if self.noisy else nullcontext():
                rows = self._reference_of(model).rows(pack)
            return compared_tokens(model, pack, rows)
        reference = self._reference(model, pack)
        tokens = token_logps(model, pack, collisions)
        return tokens, None, None if reference is None else reference.to(tokens.dtype)  # stored ones are wider

    def _reference(self, model: nn.Module, pack: Pack) -> Tensor | None:
        """Of tokens, (N,), where the objective weighs them, and else of whole answers, (2B + M,)."""
        if self.kind is None:
            return None
        with evaluating(model) if self.noisy else nullcontext():
            reference = self._reference_of(model)
            return reference.token_logps(pack) if self.objective.token_weights else reference.sums(pack)

    def _guide(self, model: nn.Module, pack: Pack) -> Tensor | None:
        """The guide's log-probs of tokens, (N,), where the objective asks for one."""
        if not self.objective.entry.guide:
            return None
        if self._guided is None or self._guided[0] is not model:
            self._guided = model, build_guide(model)
        with evaluating(model) if self.noisy else nullcontext():
            return self._guided[1].token_logps(pack)

    def probed(
        self, model: nn.Module, pack: Pack, policy: PairLogps, reference: PairLogps
    ) -> tuple[PairLogps, PairLogps]:
        """Policy and reference as the identity probe compares them: as they are given, or by a pass of its own.

        That is without dropout, and beside a live reference without compiled layers, whose graphs with and without
        gradients round otherwise.
        """
        graphs = self.kind != "cached" and is_compiled(model)
        if not self.noisy and not graphs:
            return policy, reference
        with evaluating(model), uncompiled(model) if graphs else nullcontext(), torch.no_grad():
            again = self.seen(model, pack)  # both by the same functions, which round alike
        return again.policy, reference if again.reference is None else again.reference

    def _reference_of(self, model: nn.Module) -> Reference:
        """An engine wraps policy and reference model when training begins."""
        if self._built is None or self._built[0] is not model or self._built[1] is not self.ref_model:
            self._built = model, self.ref_model, build_reference(self.kind, model, self.ref_model, self.strategy)
        return self._built[2]


def _room(pack: Pack) -> Tensor:
    """For a number a completion token, (N,)."""
    return torch.empty(len(pack.index.labels), dtype=torch.float64, device=pack.input_ids.device)


def _token_inputs(pack: Pack, reference: Tensor | None, guide: Tensor | None, draws: Tensor | None) -> TokenInputs:
    return TokenInputs(
        sequence=pack.index.sequence,
        lengths=pack.index.lengths,
        reference_tokens=reference,
        guide_tokens=guide,
        differs=pack.differs,
        turns=pack.turns,
        draws=draws,
    )


def _others(pack: Pack, sums: Tensor, reference: Tensor | None) -> OtherAnswers | None:
    if pack.others is None:
        return None
    behind = slice(2 * pack.num_pairs, None)
    before = None if reference is None else reference[behind]
    return OtherAnswers(sums[behind], before, pack.others.pair, pack.index.lengths[behind], pack.others.scores)
