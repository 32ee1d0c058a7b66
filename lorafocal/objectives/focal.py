"""The focal factors: what a power of p, or of 1 - p, makes of a loss; FocalPO is the first around DPO.

Source: Liu et al., "FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings", ACL 2025.
A factor takes the losses, (B,), and the log-odds z they are of, (B,), with p = sigmoid(z), and computes in log space:
log p = logsigmoid(z) and log(1 - p) = logsigmoid(-z). With gamma = 0 each gives the losses back bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, dpo_loss, implicit


def p_gamma(losses: Tensor, log_odds: Tensor, *, gamma: float) -> Tensor:
    """p^gamma times the losses, differentiated (not detached), elementwise: Eq. 4 of the paper around DPO's."""
    return torch.exp(gamma * logsigmoid(log_odds)) * losses


def detached(losses: Tensor, log_odds: Tensor, *, gamma: float) -> Tensor:
    """p^gamma times the losses, elementwise, p^gamma a constant weight: no gradient turns round. Not the paper's."""
    return torch.exp(gamma * logsigmoid(log_odds)).detach() * losses


def hard(losses: Tensor, log_odds: Tensor, *, gamma: float) -> Tensor:
    """(1-p)^gamma times the losses, elementwise: the emphasis on badly ranked pairs that the paper sets itself against.

    The focal loss of detection (Lin et al. 2017, arXiv:1708.02002, Eq. 4).
    """
    return torch.exp(gamma * logsigmoid(-log_odds)) * losses


def eq3(losses: Tensor, log_odds: Tensor, *, gamma: float) -> Tensor:
    """(1-p)^-gamma times the logistic losses, elementwise: Eq. 3 of the paper.

    For large log-odds z the loss is exp(-z), the factor exp(gamma z); each leaves the range of floats long before
    their product does, so their logarithms are added.
    """
    if gamma == 0:
        return losses
    far = log_odds > -math.log(2 * torch.finfo(log_odds.dtype).eps)  # from here on log(losses) is -z to the last bit
    log_losses = torch.where(far, -log_odds, torch.where(far, 1.0, losses).log())
    return torch.exp(log_losses - gamma * logsigmoid(-log_odds))


def focalpo(policy: PairLogps, reference: PairLogps, *, beta: float, gamma: float) -> PairLosses:
    """FocalPO, Eq. 4 of the paper: -p^gamma log p, the factor differentiated (not detached).

    gamma = 0 is DPO bit for bit. `lorafocal.bounds.check_gamma` says which gamma can train.
    """
    odds = implicit(policy, reference, beta=beta)
    return odds.with_losses(focal_loss(odds.log_odds, gamma=gamma))


def focal_loss(margin: Tensor, *, gamma: float) -> Tensor:
    """-p^gamma log p with p = sigmoid(margin), elementwise; finite wherever the margin is."""
    return p_gamma(dpo_loss(margin), margin, gamma=gamma)


def hard_loss(margin: Tensor, *, gamma: float) -> Tensor:
    """-(1-p)^gamma log p with p = sigmoid(margin), elementwise; finite wherever the margin is."""
    return hard(dpo_loss(margin), margin, gamma=gamma)


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
