"""The log-prob head's fold: the kernels of `head_fold_` in `lorafocal.ops.logps`.

One program a row reads it once: a running maximum and sums, one of each a lane, so that lanes meet once a row. Where a
gradient is asked for, a second kernel reads it again and writes the error in the dtype of the product that follows:
2.5 passes over the fp32 chunk for a bf16 error, where the definition takes 7.5.

The first is compiled once whatever is asked for beside it: a kernel that also wrote errors would be laid out by their
dtype and sum in another order, and policy and reference would differ in their last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafocal.ops.logps import Fold, LogitTransform
from lorafocal.ops.triton.launch import block_and_warps, launch, wide

LARGEST_BLOCK = 4096


@triton.jit
def _transformed(logits, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `LogitTransform` has it."""
    if SOFTCAP is None:
        return logits * SCALE
    else:
        scaled = logits * SCALE / SOFTCAP
        shrunk = tl.exp(-2.0 * tl.abs(scaled))
        return SOFTCAP * tl.where(scaled < 0, -1.0, 1.0) * (1.0 - shrunk) / (1.0 + shrunk)


@triton.jit
def _slope(logits, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Derivative of `_transformed`."""
    if SOFTCAP is None:
        return SCALE
    else:
        shrunk = tl.exp(-2.0 * tl.abs(logits * SCALE / SOFTCAP))
        return SCALE * 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))


@triton.jit
def _log_probs(  # type: ignore[no-untyped-def]
    logits, labels, logps, tops, totals, collisions, width,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * width
    lowest = -1e38  # finite: a lane that sees no entry contributes exp(lowest - top) = 0, not nan
    highest = tl.full((BLOCK,), lowest, WIDE)
    sums = tl.zeros((BLOCK,), WIDE)
    squares = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _transformed(tl.load(source + at, mask=at < width, other=0.0), SCALE, SOFTCAP)
        values = tl.where(at < width, values, lowest)
        higher = tl.maximum(highest, values)
        shrunk, added = tl.exp(highest - higher), tl.exp(values - higher)
        sums = sums * shrunk + added
        squares = squares * shrunk * shrunk + added * added
        highest = higher
    top = tl.max(highest, axis=0)
    total = tl.sum(sums * tl.exp(highest - top), axis=0)
    square = tl.sum(squares * tl.exp(2.0 * (highest - top)), axis=0)
    picked = _transformed(tl.load(source + tl.load(labels + row)), SCALE, SOFTCAP)
    tl.store(logps + row, picked - top - tl.log(total))
    tl.store(tops + row, top)
    tl.store(totals + row, total)
    tl.store(collisions + row, tl.log(square) - 2.0 * tl.log(total))


@triton.jit
def _errors(  # type: ignore[no-untyped-def]
    logits, labels, tops, totals, error, width,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits + row * width + at, mask=at < width, other=0.0)
    softmax = tl.exp(_transformed(raw, SCALE, SOFTCAP) - tl.load(tops + row)) * (1.0 / tl.load(totals + row))
    result = (tl.where(at == tl.load(labels + row), 1.0, 0.0) - softmax) * _slope(raw, SCALE, SOFTCAP)
    tl.store(error + row * width + at, result.to(error.dtype.element_ty), mask=at < width)


def head_fold_(
    logits: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None,
    transform: LogitTransform,
    collisions: Tensor | None = None,
) -> Fold:
    rows, width = logits.shape
    logits = logits.contiguous()
    logps, tops, totals, squares = (torch.empty(rows, dtype=logits.dtype, device=logits.device) for _ in range(4))
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    shape = {"SCALE": transform.scale, "SOFTCAP": transform.softcap, "BLOCK": block, "num_warps": warps}
    launch(
        _log_probs, (rows,), logits,
        logits, labels, logps, tops, totals, squares, width, WIDE=wide(logits.dtype), **shape,
    )  # fmt: skip
    if collisions is not None:
        collisions.copy_(squares)
    if dtype is None:
        return Fold(logps, None, 1.0)
    error = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    launch(
        _errors, (rows, triton.cdiv(width, block)), logits,
        logits, labels, tops, totals, error, width, **shape,
    )  # fmt: skip
    return Fold(logps, error, 1.0)
