"""One virtual reference made of several: the log-probs of K members, combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.references.strategy import ADAPTIVE


def geometric(logps: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean of log-probs, (K, N) to (N,): of tokens or of whole answers, it is the same.

    With the weights tau/eta of the first policy and 1 - tau/eta of the last one it is INPO's reference, and `ipo-sum`
    at eta is INPO's loss: Zhang et al. 2024, arXiv:2407.00617.
    """
    shares = torch.tensor(weights, dtype=torch.float64, device=logps.device)
    return (shares @ logps.double()).to(logps.dtype)


def harmonic(members: Sequence[PairLogps], weights: Sequence[float] | Literal["adaptive"], *, clip: float) -> PairLogps:
    """MRPO's virtual reference of B pairs: -log sum_k weight_k / pi_k, each member but the first clipped around it.

    A member's log-probs are held within a factor 1 +- clip * |mean_w| / (|mean_w| + |mean_l|) of the first member's
    (chosen answers; the rest of `clip` for rejected ones), where the means are over members. Adaptive weights are in
    proportion to how far apart a member holds the answers, |log pi_k(chosen) - log pi_k(rejected)|, before clipping.
    Source: Le et al. 2024, arXiv:2405.16388. The official code multiplies each member's 1 / pi by the
    other one's adaptive weight; here it is its own, as printed.
    """
    chosen, rejected = (torch.stack(side).double() for side in zip(*members, strict=True))  # (K, B)
    if weights == ADAPTIVE:
        shares = _adaptive((chosen - rejected).abs())
    else:
        shares = torch.tensor(weights, dtype=torch.float64, device=chosen.device)[:, None].expand_as(chosen)
    sizes = torch.stack((chosen.mean(0).abs(), rejected.mean(0).abs()))
    room = clip * torch.nan_to_num(sizes / sizes.sum(0), nan=0.5)  # (2, B)
    sides = (_harmonic(side, shares, width) for side, width in zip((chosen, rejected), room, strict=True))
    return PairLogps(*(side.to(members[0].chosen.dtype) for side in sides))


def _adaptive(gaps: Tensor) -> Tensor:
    """(K, B) that sum to 1 over members; equal ones where no member tells the answers apart."""
    total = gaps.sum(0)
    return torch.where(total > 0, gaps / torch.where(total > 0, total, 1.0), 1 / len(gaps))


def _harmonic(logps: Tensor, shares: Tensor, room: Tensor) -> Tensor:
    first = logps[0]
    low, high = first - room * first.abs(), first + room * first.abs()
    held = torch.cat((first[None], torch.minimum(torch.maximum(logps[1:], low), high)))
    return -torch.logsumexp(shares.log() - held, 0)
