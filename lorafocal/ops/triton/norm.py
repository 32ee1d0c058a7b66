"""RMSNorm: the kernels of `rms_norm` and `rms_norm_backward` in `lorafocal.ops.elementwise`, for a frozen weight.

One program a row. It reads the row twice, the second time from cache, so that a row of any width fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafocal.ops.triton.launch import block_and_warps, dense, launch, wide

LARGEST_BLOCK = 4096


@triton.jit
def _forward(x, weight, y, rstd, x_stride, width, eps: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * x_stride + at, mask=at < width, other=0.0).to(WIDE)
        squares += values * values
    factor = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd + row, factor)
    of_weight = weight.dtype.element_ty
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
        gain = tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
        normal = (values * factor).to(of_weight).to(WIDE)
        tl.store(y + row * width + at, (normal * gain).to(of_weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    upstream, x, weight, rstd, to_x, upstream_stride, x_stride, width, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(rstd + row)
    products = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        d = tl.load(upstream + row * upstream_stride + at, mask=inside, other=0.0).to(WIDE)
        gain = tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
        values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
        products += d * gain * values * factor
    along = tl.sum(products, axis=0) / width
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        d = tl.load(upstream + row * upstream_stride + at, mask=inside, other=0.0).to(WIDE)
        gain = tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
        values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
        result = (d * gain - values * factor * along) * factor
        tl.store(to_x + row * width + at, result.to(to_x.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = dense(x, weight)
    tokens, width = x.shape
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(tokens, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    launch(
        _forward, (tokens,), x,
        x, weight, y, rstd, x.stride(0), width,
        eps=eps, WIDE=wide(x.dtype), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(upstream: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    upstream, x, weight = dense(upstream, x, weight)
    tokens, width = x.shape
    to_x = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    launch(
        _backward, (tokens,), x,
        upstream, x, weight, rstd.contiguous(), to_x, upstream.stride(0), x.stride(0), width,
        WIDE=wide(x.dtype), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return to_x
