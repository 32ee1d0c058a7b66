"""CPO: DPO against a reference that finds all answers alike, with the chosen answer's likelihood beside it."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, widen
from lorafocal.objectives.sft import sft


def cpo(policy: PairLogps, *, beta: float) -> Odds:
    """Log-odds: a reward is beta * log-prob of the whole answer.

    Source: Xu et al. 2024, arXiv:2401.08417, Eq. 3.
    """
    chosen, rejected = (beta * widen(side) for side in policy)
    return Odds(chosen - rejected, chosen, rejected)


def likelihood(policy: PairLogps, *, lengths: Tensor, nll_weight: float) -> Tensor:
    """What stands beside: nll_weight * -log pi(chosen) in nats a token, (B,).

    The paper writes the whole answer's; the mean is what its trainer in TRL computes of one pair.
    """
    return nll_weight * sft(policy, lengths=lengths).losses
