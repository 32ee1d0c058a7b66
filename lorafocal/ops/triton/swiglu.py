"""SwiGLU: the kernels of `swiglu` and `swiglu_backward_` in `lorafocal.ops.elementwise`.

Everything of a SwiGLU MLP with LoRA that is not a matrix product. One pass each: an entry is read or written 3
times forwards and 6 times backwards, where the definition takes 5 and 14.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafocal.ops.triton.launch import block_and_warps, dense, launch, wide

LARGEST_BLOCK = 1024


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gate, up, product, gate_stride, up_stride, width, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    narrow = product.dtype.element_ty
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(WIDE)
    activated = (g / (1.0 + tl.exp(-g))).to(narrow).to(WIDE)
    tl.store(product + row * width + at, (activated * u).to(narrow), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    upstream, gate, up, product, to_gate, gate_stride, up_stride, width, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    narrow = product.dtype.element_ty
    d = tl.load(upstream + row * width + at, mask=inside, other=0.0).to(WIDE)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(WIDE)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    activated = (g * sigmoid).to(narrow).to(WIDE)
    to_activated = (d * u).to(narrow).to(WIDE)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(product + row * width + at, (activated * u).to(narrow), mask=inside)
    tl.store(to_gate + row * width + at, (to_activated * slope).to(narrow), mask=inside)
    tl.store(upstream + row * width + at, (d * activated).to(narrow), mask=inside)  # to_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = dense(gate, up)
    tokens, width = gate.shape
    product = torch.empty((tokens, width), dtype=gate.dtype, device=gate.device)
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    launch(
        _forward, (tokens, triton.cdiv(width, block)), gate,
        gate, up, product, gate.stride(0), up.stride(0), width,
        WIDE=wide(gate.dtype), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return product


def swiglu_backward_(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    upstream = upstream.contiguous()
    gate, up = dense(gate, up)
    tokens, width = gate.shape
    product, to_gate = torch.empty_like(upstream), torch.empty_like(upstream)
    block, warps = block_and_warps(width, LARGEST_BLOCK)
    launch(
        _backward, (tokens, triton.cdiv(width, block)), gate,
        upstream, gate, up, product, to_gate, gate.stride(0), up.stride(0), width,
        WIDE=wide(gate.dtype), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return product, to_gate, upstream
