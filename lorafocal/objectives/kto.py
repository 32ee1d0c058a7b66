"""KTO on pairs: each answer is worth what it gains over a reference point, chosen and rejected apart."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.pairwise import PairLogps, PairLosses, rewards, widen


def kto(
    policy: PairLogps,
    reference: PairLogps,
    *,
    statistics: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PairLosses:
    """Half of w_d (1 - sigmoid(chosen reward - z_d)) + w_u (1 - sigmoid(z_u - rejected reward)).

    The half makes the mean over pairs the mean over answers. The reference points are estimates of beta * KL(policy,
    reference), not below 0 and not differentiated, each from the answers of the other kind: z_d from the rejected
    answers of the whole step, z_u from the chosen ones. `statistics` (2,) are the mean log-ratios of chosen and
    rejected answers over all pairs of the step (`logratio_sums`).
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7, with the estimate of its authors' first release for data
    that comes in pairs. (For single answers they estimate the KL on answers to other prompts, which takes two more
    forward passes.)
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    point_of_rejected, point_of_chosen = (beta * statistics.to(chosen)).clamp(min=0).detach()
    losses = desirable_weight * torch.sigmoid(point_of_chosen - chosen)
    losses = losses + undesirable_weight * torch.sigmoid(rejected - point_of_rejected)
    return PairLosses(losses / 2, chosen.detach(), rejected.detach())


def logratio_sums(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Sums over a pack's pairs of the log-ratios of chosen and of rejected answers, (2,), float64, in nats."""
    sides = zip(policy, reference, strict=True)
    return torch.stack([(widen(ours).double() - widen(theirs).double()).sum() for ours, theirs in sides])
