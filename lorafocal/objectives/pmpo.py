"""PMPO: good answers made likely, bad ones unlikely, each by its own, and the policy held near the reference."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, rewards, widen


def pmpo(policy: PairLogps, reference: PairLogps, *, divergences: Tensor, alpha: float, beta: float) -> PairLosses:
    """-alpha log pi(chosen) + (1 - alpha) log pi(rejected) + beta * K, whole answers, (B,), nats.

    K, of KL(reference || policy) of whole answers, is estimated by the mean of a pair's two (`divergences`, (2B,),
    summed over tokens). The loss has no lower bound: what keeps rejected answers from vanishing is K, and the paper
    needs beta above 1 - alpha. Rewards are log-ratios in nats.
    Source: Abdolmaleki et al. 2024, arXiv:2410.04166, Eq. 10 of its third version.
    """
    likely = -alpha * widen(policy.chosen) + (1 - alpha) * widen(policy.rejected)
    losses = likely + beta * (divergences[: len(likely)] + divergences[len(likely) :]) / 2
    chosen, rejected = rewards(policy, reference, beta=1.0)
    return PairLosses(losses, chosen.detach(), rejected.detach())
