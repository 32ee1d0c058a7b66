"""TDPO: DPO with each answer's divergence from the reference, token by token, in its reward."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, rewards


def tdpo1(policy: PairLogps, reference: PairLogps, *, divergences: Tensor, beta: float) -> Odds:
    """A reward is beta * (log pi - log pi_ref + K), K the sum over the answer's tokens of KL(reference || policy).

    `divergences` (2B,) are K, chosen first. Where policy and reference are the same model it is DPO.
    Source: Zeng et al. 2024, arXiv:2404.11999, TDPO1, with K as the authors' code has it.
    """
    return _odds(policy, reference, *divergences.chunk(2), beta=beta)


def tdpo2(policy: PairLogps, reference: PairLogps, *, divergences: Tensor, beta: float, alpha: float) -> Odds:
    """The same with alpha * K in place of K, where the chosen answer's takes no gradient; alpha = 0 is DPO.

    The authors' code tells of rewards with all of K; here they are what the log-odds are made of.
    Source: Zeng et al. 2024, arXiv:2404.11999, TDPO2.
    """
    chosen, rejected = divergences.chunk(2)
    return _odds(policy, reference, alpha * chosen.detach(), alpha * rejected, beta=beta)


def _odds(policy: PairLogps, reference: PairLogps, of_chosen: Tensor, of_rejected: Tensor, *, beta: float) -> Odds:
    chosen, rejected = rewards(policy, reference, beta=beta)
    chosen, rejected = chosen + beta * of_chosen, rejected + beta * of_rejected
    return Odds(chosen - rejected, chosen, rejected)
