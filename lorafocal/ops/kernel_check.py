"""What a set of elementwise functions computes, forwards and backwards: compared with the definitions on a device.

Each `*_results` runs one function and its backward by the set `of`; `furthest` says how far two sets are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorafocal.ops.elementwise import Elementwise
from lorafocal.ops.logps import LogitTransform

# Of the norm of a row, between two ways to compute it; a wrong formula is off by more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}


def swiglu_results(of: Elementwise, gate: Tensor, up: Tensor, upstream: Tensor) -> list[Tensor]:
    """For inputs of (T, F)."""
    return [of.swiglu(gate, up), *of.swiglu_backward_(upstream.clone(), gate, up)]


def rms_norm_results(of: Elementwise, x: Tensor, upstream: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    """For rows of (T, D) and a weight (D,)."""
    y, rstd = of.rms_norm(x, weight, eps)
    return [y, rstd[:, None], of.rms_norm_backward(upstream, x, weight, rstd)]


def rope_results(of: Elementwise, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """For x (T, H, D) and angles (T, D)."""
    return [of.rope(x, cos, sin), of.rope_backward(x, cos, sin)]


def head_fold_results(
    of: Elementwise, logits: Tensor, labels: Tensor, dtype: torch.dtype, transform: LogitTransform
) -> list[Tensor]:
    """For logits (T, V) and labels (T,), with an error in `dtype` and without one."""
    collisions = logits.new_empty(len(logits), dtype=torch.float64)
    alone = of.head_fold_(logits.clone(), labels, None, transform, collisions)
    both = of.head_fold_(logits.clone(), labels, dtype, transform, None)
    assert both.error is not None  # a dtype was asked for
    error = (both.error.double() * both.factor).to(both.error.dtype)  # whose factor may be a tensor or a number
    return [*map(_beside_one, (alone.logps, both.logps, collisions)), error]


def _beside_one(logs: Tensor) -> Tensor:
    """Rows of a log and 1: the log of a probability near 1 is near 0, and as exact as the probability, not itself."""
    return torch.stack((logs, torch.ones_like(logs)), dim=-1)


def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest of all rows: norm of the difference over the norm; infinite where there is nothing to compare."""
    if [(one.shape, one.dtype) for one in ours] != [(one.shape, one.dtype) for one in theirs]:
        return float("inf")
    return float(torch.stack([*map(_furthest_row, ours, theirs)]).max())  # NaN among them is the largest


def largest(found: Iterable[float]) -> float:
    """The largest of several such distances; NaN among them is the largest, which `max` may pass over."""
    return float(torch.tensor([*found], dtype=torch.float64).max())


def _furthest_row(ours: Tensor, theirs: Tensor) -> Tensor:
    apart, size = (ours.double() - theirs.double()).norm(dim=-1), theirs.double().norm(dim=-1)
    return torch.where(apart == 0, 0.0, apart / size).max()
