"""What an objective is told of single tokens to weigh them by, and where tokens stand in their answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """All that `Entry.token_weights` may ask for of a pack's N completion tokens, by keyword; None is what it does not.

    They are those of B chosen answers, then those of B rejected ones. Nothing of it takes a gradient.
    """

    sequence: Tensor  # (N,) int64, never falling: 0..B-1 the chosen answers, B..2B-1 the rejected ones
    lengths: Tensor  # (2B,) int64: tokens of each answer
    reference_tokens: Tensor | None = None  # (N,) log-probs under the reference, nats
    guide_tokens: Tensor | None = None  # (N,) the same under one more model
    differs: Tensor | None = None  # (N,) bool: the pair's other answer does not have it, `data.differing`
    turns: Tensor | None = None  # (N,) int64: turns of the assistant's before its own; None where each answer is one
    draws: Tensor | None = None  # (B,) float64 in [0, 1): by seed, step and pair

    def asked(self) -> dict[str, Any]:
        """By keyword."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}


def places(lengths: Tensor) -> Tensor:
    """Of each token how many of its answer come before it, (N,) int64; `lengths` (2B,)."""
    starts = lengths.cumsum(0) - lengths
    count = torch.arange(int(lengths.sum()), device=lengths.device)
    return count - starts.repeat_interleave(lengths)


def shorter(lengths: Tensor) -> Tensor:
    """Tokens of the shorter answer of each answer's pair, (2B,) int64."""
    return torch.minimum(*lengths.chunk(2)).repeat(2)
