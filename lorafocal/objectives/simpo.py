"""SimPO and AlphaPO: answers are ranked by their mean log-probability a token, with a target margin; no reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, average_logps


def simpo(policy: PairLogps, *, lengths: Tensor, beta: float, gamma_beta_ratio: float) -> Odds:
    """Log-odds: margin - beta * gamma_beta_ratio, a reward being beta * mean log-prob of an answer's tokens.

    `lengths` (2B,) are completion tokens, chosen first. The target is stated over beta, in nats a token, as the
    paper's own code has it.
    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return alphapo(policy, lengths=lengths, beta=beta, gamma_beta_ratio=gamma_beta_ratio, alpha=0.0)


def alphapo(policy: PairLogps, *, lengths: Tensor, beta: float, gamma_beta_ratio: float, alpha: float) -> Odds:
    """SimPO with another shape of reward, beta * (1 - p^-alpha) / alpha of an answer's probability a token p.

    p is the geometric mean over its tokens. alpha = 0 is SimPO's beta * log p, which is the limit.
    Source: Gupta et al. 2025, arXiv:2501.03884.
    """
    chosen, rejected = (beta * _shaped(average, alpha) for average in average_logps(policy, lengths))
    return Odds(chosen - rejected - beta * gamma_beta_ratio, chosen, rejected)


def _shaped(logps: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha * logps)) / alpha; logps themselves where alpha is 0."""
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha
