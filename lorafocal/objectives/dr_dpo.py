"""Dr. DPO: DPO robust to noisy pairs: those that are ranked worse than the step's others weigh less."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.pairwise import Over


def robust_mean(losses: Tensor, *, beta_prime: float) -> Over:
    """-b log mean exp(-l / b) of a step's losses, as the loss of each, (B,).

    A pair's slope is its own times exp(-l / b) over the step's mean of that: b -> inf is the mean, and a small b looks
    at the pairs that are ranked best.
    Source: Wu et al. 2024, arXiv:2407.07880, Eq. 12, with the authors' code: b is its beta', 1.
    """
    least = losses.detach().min()
    mean = torch.expm1((least - losses) / beta_prime).mean()  # above -1: exact for a large b, finite for a small one
    return Over((least - beta_prime * torch.log1p(mean)).expand(len(losses)))
