"""Omni-DPO (now Uni-DPO): weighs up pairs of good quality that the policy does not fit yet, FocalPO's opposite.

Source: Peng et al. 2025, arXiv:2506.10054, with mean log-probs a token as in its recipes for text. The log-odds are
those of length-normalised DPO.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import average_logps, dpo_loss, widen


def weighted(log_odds: Tensor, quality: Tensor, shift: Tensor, *, gamma: float) -> Tensor:
    """quality * (1 - sigmoid(log_odds + shift))^gamma * -log p, elementwise, the power differentiated."""
    return quality * torch.exp(gamma * logsigmoid(-log_odds - shift)) * dpo_loss(log_odds)


def constants(
    policy: PairLogps,
    reference: PairLogps,
    *,
    lengths: Tensor,
    scores: PairScores,
    beta: float,
    eta: float,
    tau_ref: float,
) -> tuple[Tensor, Tensor]:
    """A pair's quality, sigmoid(eta * score gap), and what the performance weight adds to its log-odds, (B,) each.

    That weight looks at the policy's own log-odds less the target tau_ref; the log-odds of the loss lack the
    reference's in these.
    """
    chosen, rejected = average_logps(reference, lengths)
    quality = torch.sigmoid(eta * (widen(scores.chosen) - widen(scores.rejected)))
    return quality.to(chosen), beta * (chosen - rejected) - tau_ref


def calibration(
    policy: PairLogps,
    reference: PairLogps,
    *,
    lengths: Tensor,
    scores: PairScores,
    nll_weight: float,
    tau_good: float,
) -> Tensor:
    """nll_weight * -log pi(chosen) in nats a token, (B,), of good answers less likely than to the reference."""
    ours, theirs = (average_logps(model, lengths).chosen for model in (policy, reference))
    fell = (theirs > ours) & (scores.chosen >= tau_good)
    return -nll_weight * torch.where(fell, ours, 0.0)
