"""MaPPO: a rejected answer counts against a pair as far as a judge finds it worse."""

from __future__ import annotations

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import Odds, rewards, widen


def mappo(policy: PairLogps, reference: PairLogps, *, scores: PairScores, beta: float) -> Odds:
    """Log-odds: chosen reward - (chosen score - rejected score) * rejected reward; a gap of 1 is DPO.

    Scores are from 0 to 1. The rejected reward is logged with its factor.
    Source: Lan et al. 2025, arXiv:2507.21183, Eq. 8.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    rejected = (widen(scores.chosen) - widen(scores.rejected)).to(rejected) * rejected
    return Odds(chosen - rejected, chosen, rejected)
