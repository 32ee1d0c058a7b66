"""WPO: DPO's loss times the policy's own probability of both answers, so that off-policy pairs weigh less."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import average_logps, dpo_loss, widen


def weighted(log_odds: Tensor, weights: Tensor) -> Tensor:
    """DPO's loss of the log-odds times constant weights of the pairs, elementwise."""
    return weights * dpo_loss(log_odds)


def constants(policy: PairLogps, *, lengths: Tensor, collisions: Tensor) -> tuple[Tensor]:
    """Each pair's weight, (B,): of both answers, the geometric mean over tokens of pi(token) / sum_v pi(v)^2.

    A token sampled from the policy has log-weight 0 in expectation or less; a weight may pass 1 for a likely answer.
    Source: Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with the weights aligned for sampling. The paper's own code caps
    the product at 1, the equation and TRL do not, and neither does this.
    """
    chosen, rejected = collisions.split(len(policy.chosen))
    aligned = average_logps(PairLogps(policy.chosen - chosen, policy.rejected - rejected), lengths)
    return (torch.exp(aligned.chosen + aligned.rejected).to(widen(policy.chosen)),)  # collisions are float64
