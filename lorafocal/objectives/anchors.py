"""What stands beside a preference loss so that chosen answers do not become less likely with the rejected ones."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import dpo_loss, rewards, widen


def regulariser(policy: PairLogps, *, beta: float, eta: float) -> Tensor:
    """Regularised PO: eta * beta * -log pi(chosen) of the whole answer, nats, (B,).

    Source: Liu et al. 2024, arXiv:2405.16436; the scale is that of its own code's cumulative loss.
    """
    return -eta * beta * widen(policy.chosen)


def anchored(policy: PairLogps, reference: PairLogps, *, beta: float, anchor: float) -> Tensor:
    """mDPO's anchor: -log sigmoid(chosen reward - anchor), (B,): a chosen answer's reward should exceed it.

    Source: Wang et al. 2024, arXiv:2406.11839, without the term of images.
    """
    chosen, _ = rewards(policy, reference, beta=beta)
    return dpo_loss(chosen - anchor)
