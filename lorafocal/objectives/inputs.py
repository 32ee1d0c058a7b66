"""What objectives are told of B pairs, and how the pairs of several packs are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PairLogps(NamedTuple):
    """Summed completion log-probabilities of B pairs under one model, in nats."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


class PairScores(NamedTuple):
    """A judge's scores of B pairs' answers, on the judge's own scale; higher is better."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


class OtherAnswers(NamedTuple):
    """M further answers to the prompts of B pairs: a third answer of each, or the rest of a ranked list."""

    logps: Tensor  # (M,) summed, under the policy, nats
    reference: Tensor | None  # (M,) the same under the reference
    pair: Tensor  # (M,) int64: whose prompt each answers, never falling
    lengths: Tensor  # (M,) completion tokens
    scores: Tensor | None  # (M,) a judge's


@dataclass(frozen=True, slots=True, kw_only=True)
class PairInputs:
    """All that an objective may ask for of B pairs; None is what it does not.

    (2B,) are both answers of each, chosen first.
    """

    policy: PairLogps
    reference: PairLogps | None = None
    lengths: Tensor | None = None  # (2B,) int64: completion tokens
    scores: PairScores | None = None
    collisions: Tensor | None = None  # (2B,) sums over tokens of log sum_v pi_v^2, nats
    divergences: Tensor | None = None  # (2B,) sums over tokens of KL(reference || policy), nats, differentiable
    guide: PairLogps | None = None  # under one more model
    others: OtherAnswers | None = None
    groups: Tensor | None = None  # (B,) int64 in [0, num_groups)
    num_groups: int | None = None  # of all pairs of the run
    embeddings: Tensor | None = None  # (B, E) of the prompts
    draws: Tensor | None = None  # (B,) float64 in [0, 1): by seed, step and pair

    def asked(self) -> dict[str, Any]:
        """By keyword, without the policy."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "policy"}


OF_BOTH = ("lengths", "collisions", "divergences")  # (2B,)
OF_PAIRS = ("groups", "embeddings", "draws")  # (B, ...)


def joined(parts: Sequence[PairInputs]) -> PairInputs:
    """The pairs of all `parts` in their order; each has what the others have."""

    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if name == "others":
            return _joined_others(values, [len(part.policy.chosen) for part in parts])
        if values[0] is None or name == "num_groups":
            return values[0]
        if name in OF_BOTH:
            chosen, rejected = zip(*(value.chunk(2) for value in values), strict=True)
            return torch.cat((*chosen, *rejected))
        if name in OF_PAIRS:
            return torch.cat(values)
        return type(values[0])(*map(torch.cat, zip(*values, strict=True)))

    return PairInputs(**{spec.name: column(spec.name) for spec in fields(PairInputs)})


def _joined_others(parts: Sequence[OtherAnswers | None], pairs: Sequence[int]) -> OtherAnswers | None:
    """Of packs of so many pairs each; one may have no further answers."""
    moved = [part._replace(pair=part.pair + sum(pairs[:n])) for n, part in enumerate(parts) if part is not None]
    columns = zip(*moved, strict=True)
    joint: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    return OtherAnswers(*joint) if joint else None
