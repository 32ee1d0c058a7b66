"""DiscoPOP: a loss that a language model found, between the logistic and the exponential one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.pairwise import dpo_loss


def discopop(log_odds: Tensor, *, tau: float) -> Tensor:
    """(1 - m) * -log p + m * exp(-z) with m = sigmoid(z / tau), elementwise; not convex: flat or worse near z = 0.

    exp(-z) is taken together with m, in log space: alone it overflows where m takes it to 0. So tau is at most 1.
    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5 (the log-ratio modulated loss).
    """
    tempered = log_odds / tau
    return torch.sigmoid(-tempered) * dpo_loss(log_odds) + torch.exp(logsigmoid(tempered) - log_odds)
