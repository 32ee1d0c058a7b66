"""What a careless author would have written of a loss: the printed formula, which holds near a margin of 0.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

from typing import Any


def cut_exponential(logratios: Any, alpha: float) -> Any:
    """Row 11: an exponential that is only cut off is finite, but finds all answers beyond the cut alike."""
    return (1 - (-alpha * logratios).clamp(max=80).exp()) / alpha


def discopop_as_printed(log_odds: Any, *, tau: float) -> Any:
    """Row 11: a share of nothing of an exponential that is infinite."""
    from lorafocal.objectives.pairwise import dpo_loss

    share = (log_odds / tau).sigmoid()
    return (1 - share) * dpo_loss(log_odds) + share * (-log_odds).exp()


def ternary_as_printed(log_odds: Any, tied: Any, *, alpha: float) -> Any:
    """Row 11: a tie's denominator overflows from margins of 88 on."""
    import math

    import torch

    from lorafocal.objectives.pairwise import dpo_loss

    z = log_odds + alpha
    tie = ((1 + (alpha + z).exp()) * (1 + (alpha - z).exp())).log() - math.log(math.expm1(2 * alpha))
    return torch.where(tied > 0, tie, dpo_loss(log_odds))


def kl_by_its_shares(one: Any, other: Any) -> Any:
    """Row 11: the logarithm of a share that rounds to nothing."""
    p, q = (one.sigmoid(), (-one).sigmoid()), (other.sigmoid(), (-other).sigmoid())
    return sum(ours * (ours / theirs).log() for ours, theirs in zip(p, q, strict=True))
