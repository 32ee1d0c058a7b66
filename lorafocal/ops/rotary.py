"""Rotary positions as an autograd function: backward keeps cos and sin, which all layers share, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafocal.ops.autograd import first_order
from lorafocal.ops.elementwise import Elementwise


def rotated(x: Tensor, cos: Tensor, sin: Tensor, functions: Elementwise) -> Tensor:
    """x (B, H, T, D) turned by cos and sin, (1 or B, T, D), as `elementwise.rope` does: (B, H, T, D)."""
    output: Tensor = _Rotated.apply(x, cos, sin, functions)
    return output


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, functions: Elementwise) -> Tensor:
        ctx.functions = functions
        ctx.save_for_backward(cos, sin)
        return _by_token(functions.rope, x, cos, sin)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _by_token(ctx.functions.rope_backward, upstream, *ctx.saved_tensors), None, None, None


def _by_token(turn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turn` of (tokens, H, D): the memory of a projection's output, so nothing is copied."""
    batch, heads, tokens, width = x.shape
    cos, sin = (angle.expand(batch, -1, -1).reshape(-1, width) for angle in (cos, sin))
    turned: Tensor = turn(x.transpose(1, 2).reshape(-1, heads, width), cos, sin)
    return turned.view(batch, tokens, heads, width).transpose(1, 2)
