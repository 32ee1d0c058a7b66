"""f-DPO: DPO whose policy is held near the reference by another divergence than the reverse KL, which is `dpo`.

A reward is beta * f'(pi / pi_ref) of a whole answer, here without constants, which cancel in log-odds: 0 at the start.
Source: Wang et al. 2023, arXiv:2309.16240.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, rewards

STRAIGHT_FROM = 30.0
"""The exponent from which exp goes on as its tangent: rewards of -1e13 keep their order, and float32 its range."""


def forward_kl(policy: PairLogps, reference: PairLogps, *, beta: float) -> Odds:
    """The forward KL, f'(u) = -1/u: a reward is beta * (1 - pi_ref / pi), at most beta."""
    return alpha_divergence(policy, reference, beta=beta, alpha=1.0)


def alpha_divergence(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Odds:
    """An alpha-divergence: a reward is beta * (1 - (pi / pi_ref)^-alpha) / alpha, at most beta / alpha.

    Between the reverse KL (alpha near 0) and the forward KL (near 1). TRL's coefficient is 1 - alpha.
    """
    chosen, rejected = (beta * _falling(side, alpha) for side in rewards(policy, reference, beta=1.0))
    return Odds(chosen - rejected, chosen, rejected)


def jensen_shannon(policy: PairLogps, reference: PairLogps, *, beta: float) -> Odds:
    """The Jensen-Shannon divergence: a reward is beta * log(2 pi / (pi + pi_ref)), at most beta * log 2."""
    chosen, rejected = (beta * (math.log(2) + logsigmoid(side)) for side in rewards(policy, reference, beta=1.0))
    return Odds(chosen - rejected, chosen, rejected)


def _falling(logratios: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha * logratios)) / alpha, elementwise; below -STRAIGHT_FROM / alpha a straight line."""
    exponent = -alpha * logratios
    beyond = relu(exponent - STRAIGHT_FROM)  # no difference to the clamped one: slopes of 1e13 would cancel in it
    return -(torch.expm1(exponent.clamp(max=STRAIGHT_FROM)) + math.exp(STRAIGHT_FROM) * beyond) / alpha
