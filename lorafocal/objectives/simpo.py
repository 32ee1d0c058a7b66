"""SimPO: answers are ranked by their mean log-probability a token, with a target margin; no reference."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.pairwise import Odds, PairLogps, average_logps


def simpo(policy: PairLogps, *, lengths: Tensor, beta: float, gamma_beta_ratio: float) -> Odds:
    """Log-odds: margin - beta * gamma_beta_ratio, a reward being beta * mean log-prob of an answer's tokens.

    `lengths` (2B,) are completion tokens, chosen first. The target is stated over beta, in nats a token, as the
    paper's own code has it.
    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    chosen, rejected = (beta * average for average in average_logps(policy, lengths))
    return Odds(chosen - rejected - beta * gamma_beta_ratio, chosen, rejected)
