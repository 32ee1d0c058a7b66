"""TGDPO: tokens weigh by the reward that an earlier preference run, the guide, gives each."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(
    policy_tokens: Tensor,
    *,
    sequence: Tensor,
    lengths: Tensor,
    reference_tokens: Tensor,
    guide_tokens: Tensor,
    beta: float,
    alpha: float,
) -> Tensor:
    """1 + `alpha` r of a chosen answer's token and 1 - `alpha` r of a rejected one's, (N,): alpha 0 is DPO.

    r is `beta` times the token's log-ratio of guide and reference. A weight may be negative, as in the authors' code.

    Source: Zhu et al. 2025, arXiv:2506.14574; dvlab-research/TGDPO.
    """
    reward = beta * (guide_tokens - reference_tokens)
    sides = torch.where(sequence < len(lengths) // 2, alpha, -alpha).to(policy_tokens)
    return 1 + sides * reward
