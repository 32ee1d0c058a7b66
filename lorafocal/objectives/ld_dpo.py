"""LD-DPO: what an answer is longer by weighs less."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.tokens import places, shorter


def weights(policy_tokens: Tensor, *, sequence: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """1 up to the length of the pair's shorter answer and `alpha` beyond it, (N,): 1 is DPO.

    Source: Liu et al. 2024, arXiv:2409.06411; TRL's `ld_alpha` is the same.
    """
    beyond = places(lengths) >= shorter(lengths)[sequence]
    return torch.where(beyond, alpha, 1.0).to(policy_tokens)
