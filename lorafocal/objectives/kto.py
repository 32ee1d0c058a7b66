"""KTO on pairs: each answer is worth what it gains over a reference point, chosen and rejected apart."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, rewards


def kto(
    policy: PairLogps, reference: PairLogps, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> PairLosses:
    """Half of w_d (1 - sigmoid(chosen reward - z_d)) + w_u (1 - sigmoid(z_u - rejected reward)), of a whole step.

    The half makes the mean over pairs the mean over answers. The reference points are estimates of beta * KL(policy,
    reference), not below 0 and not differentiated, each from the answers of the other kind: z_d is the mean reward of
    the step's rejected answers, z_u that of the chosen ones.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7, with the estimate of its authors' first release for data
    that comes in pairs. (For single answers they estimate the KL on answers to other prompts, which takes two more
    forward passes.)
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    losses = desirable_weight * torch.sigmoid(_point(rejected) - chosen)
    losses = losses + undesirable_weight * torch.sigmoid(rejected - _point(chosen))
    return PairLosses(losses / 2, chosen.detach(), rejected.detach())


def _point(rewards_of_others: Tensor) -> Tensor:
    return rewards_of_others.detach().double().mean().clamp(min=0).to(rewards_of_others)
