"""Losses that stop where the margin is wide enough: the hinge of SLiC and RSO, and RePO."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, average_logps, rewards


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """max(0, 1 - margin) of the implicit rewards: from a margin of 1 on a pair teaches nothing.

    Source: Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm, after Zhao et al. 2023 (SLiC), arXiv:2305.10425; beta
    is its gamma.
    """
    return _below(1.0, *rewards(policy, reference, beta=beta))


def repo(policy: PairLogps, *, lengths: Tensor, target_margin: float) -> PairLosses:
    """max(0, target_margin - difference of the mean log-probs a token), which are the rewards; no reference, no beta.

    The limit of SimPO's loss over beta as beta grows. `lengths` (2B,) are completion tokens, chosen first.
    Source: Wu et al. 2025, arXiv:2503.07426.
    """
    return _below(target_margin, *average_logps(policy, lengths))


def _below(target: float, chosen: Tensor, rejected: Tensor) -> PairLosses:
    return PairLosses(torch.relu(target - (chosen - rejected)), chosen.detach(), rejected.detach())
