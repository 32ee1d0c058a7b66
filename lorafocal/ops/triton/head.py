"""The log-prob head's fold: the kernel of `head_fold_` in `lorafocal.ops.logps`.

One program a row, two passes over it: a running maximum and sum of exponentials, one of each a lane, so that lanes
meet once a row; then the error, written once in the dtype of the product that follows. 2.5 passes over the fp32 chunk
for a bf16 error, where the definition takes 7.5.
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
def _fold(  # type: ignore[no-untyped-def]
    logits, labels, logps, error, collisions, stride, width,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, DIFFERENTIATED: tl.constexpr, COLLIDING: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride
    label = tl.load(labels + row)
    picked = _transformed(tl.load(source + label), SCALE, SOFTCAP)  # before an error may take the logits' place
    lowest = -1e38  # finite: a lane that sees no entry contributes exp(lowest - top) = 0, not nan
    tops = tl.full((BLOCK,), lowest, WIDE)
    totals = tl.zeros((BLOCK,), WIDE)
    squares = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _transformed(tl.load(source + at, mask=at < width, other=0.0), SCALE, SOFTCAP)
        values = tl.where(at < width, values, lowest)
        higher = tl.maximum(tops, values)
        shrunk, added = tl.exp(tops - higher), tl.exp(values - higher)
        totals = totals * shrunk + added
        if COLLIDING:
            squares = squares * shrunk * shrunk + added * added
        tops = higher
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)
    tl.store(logps + row, picked - top - tl.log(total))
    if COLLIDING:
        square = tl.sum(squares * tl.exp(2.0 * (tops - top)), axis=0)
        tl.store(collisions + row, (tl.log(square) - 2.0 * tl.log(total)).to(collisions.dtype.element_ty))
    if DIFFERENTIATED:
        share = 1.0 / total
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            raw = tl.load(source + at, mask=at < width, other=0.0)
            softmax = tl.exp(_transformed(raw, SCALE, SOFTCAP) - top) * share
            result = (tl.where(at == label, 1.0, 0.0) - softmax) * _slope(raw, SCALE, SOFTCAP)
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
    logps = torch.empty(rows, dtype=logits.dtype, device=logits.device)
    error = logits if dtype in (None, logits.dtype) else torch.empty_like(logits, dtype=dtype)
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    launch(
        _fold, (rows,), logits,
        logits, labels, logps, error, logps if collisions is None else collisions, logits.stride(0), width,
        SCALE=transform.scale, SOFTCAP=transform.softcap, DIFFERENTIATED=dtype is not None,
        COLLIDING=collisions is not None, WIDE=wide(logits.dtype), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return Fold(logps, None if dtype is None else error, 1.0)
