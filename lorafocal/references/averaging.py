"""The average of two low-rank changes of one weight, as a low-rank change again: exact in Delta W = scale * B A.

Averaging A with A and B with B gives another model: the average of products is not the product of averages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DROPPED = 2.0**-24  # of the largest singular value: what fp32 factors cannot hold beside it


class LowRank(NamedTuple):
    """Delta W = scale * b a."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    scale: float


def averaged(policy: LowRank, reference: LowRank, mixing: float) -> LowRank:
    """mixing * Delta W of the policy + (1 - mixing) * that of the reference, at the reference's scale, in its dtype.

    The factors are put side by side, which is exact at the sum of the ranks, and compressed to the rank that the sum
    has: QR of both sides, an SVD of the small core, all in float64. Singular values at or below `DROPPED` of the
    largest are left out. What a reference holds of a policy fades with (1 - mixing) per update, so ranks stay bounded
    by R * (1 + log(DROPPED) / log(1 - mixing)), and by the weight's own sides.
    """
    b = torch.cat((mixing * policy.scale * policy.b.double(), (1 - mixing) * reference.scale * reference.b.double()), 1)
    a = torch.cat((policy.a.double(), reference.a.double()))
    b, a = compressed(b, a)
    dtype = reference.a.dtype
    return LowRank(a.to(dtype), (b / reference.scale).to(dtype), reference.scale)


def compressed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """b (out, R) and a (R, in) of the same product at its own rank, at least 1, to rounding; a has orthonormal rows."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    rank = max(1, int((values > DROPPED * values[0]).sum()))
    return left @ (u[:, :rank] * values[:rank]), v[:rank] @ right.T
