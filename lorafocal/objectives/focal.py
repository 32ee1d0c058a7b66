"""FocalPO: DPO's -log p scaled by p^gamma, so that badly misranked pairs weigh less.

Source: Liu et al., "FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings", ACL 2025.
Everything is a function of the margin z with p = sigmoid(z), in log space: lp = log p = logsigmoid(z).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.pairwise import PairLogps, PairLosses, pair_losses


def focalpo(policy: PairLogps, reference: PairLogps, *, beta: float, gamma: float) -> PairLosses:
    """FocalPO, Eq. 4 of the paper: -p^gamma log p, the factor differentiated (not detached).

    gamma = 0 is DPO bit for bit. `lorafocal.bounds.check_gamma` says which gamma can train.
    """
    return pair_losses(policy, reference, beta=beta, loss_of_margin=partial(focal_loss, gamma=gamma))


def focal_hard(policy: PairLogps, reference: PairLogps, *, beta: float, gamma: float) -> PairLosses:
    """The hard emphasis that the paper sets itself against (its Figures 1 and 4): -(1-p)^gamma log p.

    The focal loss of detection (Lin et al. 2017, arXiv:1708.02002, Eq. 4) on a pair's margin: well ranked pairs weigh
    less, and no gradient turns round. gamma = 0 is DPO bit for bit.
    """
    return pair_losses(policy, reference, beta=beta, loss_of_margin=partial(hard_loss, gamma=gamma))


def focal_loss(margin: Tensor, *, gamma: float) -> Tensor:
    """-p^gamma log p with p = sigmoid(margin), elementwise; finite wherever the margin is."""
    lp = logsigmoid(margin)
    return -torch.exp(gamma * lp) * lp


def hard_loss(margin: Tensor, *, gamma: float) -> Tensor:
    """-(1-p)^gamma log p with p = sigmoid(margin), elementwise; finite wherever the margin is."""
    return -torch.exp(gamma * logsigmoid(-margin)) * logsigmoid(margin)


def focal_weight(margin: Tensor, *, gamma: float) -> Tensor:
    """-dL/dmargin = (1 - p) p^gamma (1 + gamma log p), elementwise (the paper's Eq. 6 over beta).

    Negative below `turning_point(gamma)`: there a step lowers the margin further.
    """
    return torch.sigmoid(-margin) * focal_ratio_to_dpo(margin, gamma=gamma)


def focal_weight_terms(margin: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """The two terms of Eq. 6 whose sum is `focal_weight`: (1 - p) p^gamma, and gamma (1 - p) p^gamma log p."""
    lp = logsigmoid(margin)
    first = torch.sigmoid(-margin) * torch.exp(gamma * lp)
    return first, gamma * lp * first


def focal_ratio_to_dpo(margin: Tensor, *, gamma: float) -> Tensor:
    """Gradient weight over DPO's: p^gamma (1 + gamma log p), elementwise, at most 1."""
    lp = logsigmoid(margin)
    return torch.exp(gamma * lp) * (1 + gamma * lp)


def turning_point(gamma: float) -> float:
    """Margin below which the gradient turns round: log p = -1/gamma, z = -log(exp(1/gamma) - 1).

    -inf for gamma = 0. About -20 at gamma 0.05.
    """
    if gamma == 0:
        return -math.inf
    return -(1 / gamma + math.log(-math.expm1(-1 / gamma)))


def identity_loss(gamma: float) -> float:
    """The loss where policy and reference agree (p = 1/2): 2^-gamma ln 2; 0.669536 at gamma 0.05."""
    return 2.0**-gamma * math.log(2)
