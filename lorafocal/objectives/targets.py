"""Losses of log-odds that have a target, and draw back what goes past it: EXO, and NVIDIA's reward-aware PO.

A target R is the log-odds that a pair should have; p = sigmoid(z) is the policy's of log-odds z, and P = sigmoid(R).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import widen


def exo(log_odds: Tensor, *, label_smoothing: float) -> Tensor:
    """EXO-pref: KL(p || (1-e, e)), elementwise: the reverse KL, where cDPO's is the forward one.

    The gradient runs through p, and so fades for pairs that are ranked very wrong. Lowest where p = 1-e.
    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    target = math.log1p(-label_smoothing) - math.log(label_smoothing)
    return from_policy(log_odds, torch.full_like(log_odds, target))


def squared(log_odds: Tensor, target: Tensor) -> Tensor:
    """Reward-aware PO by squared distance: (z - R)^2, elementwise.

    Source, for the three of them: Sun et al. 2025, arXiv:2502.00203; NeMo-Aligner's rpo_sq, rpo_bwd_kl and rpo_fwd_kl.
    """
    return (log_odds - target).square()


def to_policy(log_odds: Tensor, target: Tensor) -> Tensor:
    """Reward-aware PO by what its code calls the backward KL: KL(P || p), elementwise; cDPO with labels of its own."""
    return _kl(target, log_odds)


def from_policy(log_odds: Tensor, target: Tensor) -> Tensor:
    """Reward-aware PO by what its code calls the forward KL: KL(p || P), elementwise."""
    return _kl(log_odds, target)


def score_gap(policy: PairLogps, *, scores: PairScores, eta: float) -> tuple[Tensor]:
    """The target of each pair, (B,): eta * (chosen score - rejected score)."""
    return ((eta * (widen(scores.chosen) - widen(scores.rejected))).to(widen(policy.chosen)),)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL between the two-sided coins of these log-odds, elementwise, in log space."""
    heads = torch.sigmoid(one) * (logsigmoid(one) - logsigmoid(other))
    tails = torch.sigmoid(-one) * (logsigmoid(-one) - logsigmoid(-other))
    return heads + tails
