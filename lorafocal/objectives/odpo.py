"""ODPO: DPO that wants a wider margin where a judge's scores lie further apart."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import Odds, implicit, widen


def odpo(policy: PairLogps, reference: PairLogps, *, scores: PairScores, beta: float, alpha: float) -> Odds:
    """Log-odds: margin - alpha * log(chosen score - rejected score).

    Every chosen score must be above the rejected one. alpha = 0 is DPO, and so is a gap of 1.
    Source: Amini et al. 2024, arXiv:2402.10571, Eq. 8 with f = log.
    """
    odds = implicit(policy, reference, beta=beta)
    return odds._replace(log_odds=odds.log_odds - score_offset(scores, alpha=alpha).to(odds.log_odds))


def score_offset(scores: PairScores, *, alpha: float) -> Tensor:
    """The margin that a pair should exceed, (B,), a constant: alpha * log(score gap)."""
    return alpha * torch.log(widen(scores.chosen) - widen(scores.rejected)).detach()
