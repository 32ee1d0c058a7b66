"""TODO: preferences of three kinds, better, worse and tied; two answers of equal score are a tie.

With z the margin of the implicit rewards, the chosen answer is better with probability sigmoid(z - alpha), worse with
sigmoid(-z - alpha), and else the two are tied.
Source: Guo et al. 2024, arXiv:2411.02442, after Rao and Kupper 1967.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import Odds, dpo_loss, implicit, widen


def todo(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Odds:
    """Log-odds of the chosen answer being better, not tied: margin - alpha."""
    odds = implicit(policy, reference, beta=beta)
    return odds._replace(log_odds=odds.log_odds - alpha)


def ties(policy: PairLogps, *, scores: PairScores) -> tuple[Tensor]:
    """1 for a pair whose answers are tied, 0 for every other, (B,)."""
    return ((scores.chosen == scores.rejected).to(widen(policy.chosen)),)


def ternary(log_odds: Tensor, tied: Tensor, *, alpha: float) -> Tensor:
    """-log of the probability of what was seen, elementwise: better, or, where `tied` is 1, a tie.

    A tie's is (e^(2 alpha) - 1) / ((1 + e^(alpha + z)) (1 + e^(alpha - z))), its logarithm taken factor by factor.
    """
    margin = log_odds + alpha
    scale = 2 * alpha + math.log(-math.expm1(-2 * alpha))
    tie = -logsigmoid(-alpha - margin) - logsigmoid(margin - alpha) - scale
    return torch.where(tied > 0, tie, dpo_loss(log_odds))
