"""Rotary positions: the kernel of `rope` and `rope_backward` in `lorafocal.ops.elementwise`.

One program a token and group of heads: cos and sin are read once for all of them, x is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafocal.ops.triton.launch import dense, launch, wide

ENTRIES = 1024  # of half a head, times heads, that a program of 4 warps holds


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, cos, sin, y, token_stride, head_stride, cos_stride, sin_stride, heads, half,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    narrow = y.dtype.element_ty
    source = x + token * token_stride + head.to(tl.int64) * head_stride + at
    first = tl.load(source, mask=inside, other=0.0).to(WIDE)
    second = tl.load(source + half, mask=inside, other=0.0).to(WIDE)
    cos1 = tl.load(cos + token * cos_stride + at, mask=at < half, other=0.0).to(WIDE)
    cos2 = tl.load(cos + token * cos_stride + half + at, mask=at < half, other=0.0).to(WIDE)
    sin1 = tl.load(sin + token * sin_stride + at, mask=at < half, other=0.0).to(WIDE)
    sin2 = tl.load(sin + token * sin_stride + half + at, mask=at < half, other=0.0).to(WIDE)
    if BACKWARD:
        across1, across2 = second * sin2, -first * sin1
    else:
        across1, across2 = -second * sin1, first * sin2
    y1 = (first * cos1).to(narrow).to(WIDE) + across1.to(narrow).to(WIDE)
    y2 = (second * cos2).to(narrow).to(WIDE) + across2.to(narrow).to(WIDE)
    target = y + (token * heads + head) * 2 * half + at
    tl.store(target, y1.to(narrow), mask=inside)
    tl.store(target + half, y2.to(narrow), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    x, cos, sin = dense(x, cos, sin)
    tokens, heads, width = x.shape
    y = torch.empty((tokens, heads, width), dtype=x.dtype, device=x.device)
    half = triton.next_power_of_2(width // 2)
    group = min(triton.next_power_of_2(heads), max(1, ENTRIES // half))
    launch(
        _turn, (tokens, triton.cdiv(heads, group)), x,
        x, cos, sin, y, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), heads, width // 2,
        BACKWARD=backward, WIDE=wide(x.dtype), HEADS=group, HALF=half, num_warps=4,
    )  # fmt: skip
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x, cos, sin, backward=False)


def rope_backward(upstream: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(upstream, cos, sin, backward=True)
