"""Linear layers with low-rank adapters over frozen weights, as autograd functions that save little.

    y = x W^T + bias + scale (x A^T) B^T        W (out, in) frozen, A (R, in) and B (out, R) trained

`adapted_linear` and `gated_mlp_plain` are the definitions, `elementwise.rms_norm` that of the norm. The fast functions
equal them: the low-rank part is added in the memory of the base's product, no gradient towards W is computed, and a
weight that has to be de-quantised is so once a pass. They compute in x's dtype, autocast or not; A and B are masters in
fp32 or wider, and so are their gradients, sums over tokens included. With B = 0 the result is the base's to the bit.

Kept for the backward, in elements a token (R: sum of the adapters' ranks; D: a block's width, F: its inner width):

    shared_linear    D + R         D is 0 where x is a norm's output, which keeps its own input (`Normed`)
    gated_mlp        D + 2 F + R   D as above; with `recompute` D + R
    Norm             D + 1         the one in fp32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafocal.ops.autograd import first_order, own_outputs, without_autocast
from lorafocal.ops.elementwise import Elementwise, Gated


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    a: Tensor  # (R, in), fp32 or wider
    b: Tensor  # (out, R)
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A frozen linear layer and what is trained on it."""

    weight: Callable[[torch.dtype], Tensor]  # -> (out, in) in that dtype; every call may de-quantise
    bias: Tensor | None = None  # (out,)
    adapter: Adapter | None = None

    @property
    def rank(self) -> int:
        return 0 if self.adapter is None else self.adapter.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm with a frozen weight: see `elementwise.rms_norm`."""

    weight: Tensor  # (D,)
    eps: float
    elementwise: Elementwise

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D); the backward keeps x and one number a row."""
        output: Tensor = _Norm.apply(x, self)
        return output

    def again(self, x: Tensor) -> Tensor:
        """The same bits, without a backward."""
        return self.elementwise.rms_norm(x, self.weight, self.eps)[0]


class Normed(NamedTuple):
    """Says that a function's x is the output of `norm`: `source`, which the norm keeps anyway, is kept in its place."""

    source: Tensor  # (T, D)
    norm: Norm


def adapted_linear(x: Tensor, layer: Linear) -> Tensor:
    """x (T, in) -> (T, out): the definition."""
    y = linear(x, layer.weight(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    if layer.adapter is None:
        return y
    a, b = layer.adapter.a.to(x.dtype), layer.adapter.b.to(x.dtype)
    return y + linear(linear(x, a), b) * layer.adapter.scale


def gated_mlp_plain(x: Tensor, gate: Linear, up: Linear, down: Linear, gated: Gated) -> Tensor:
    """x (T, D) -> (T, D) by way of (T, F): the definition."""
    return adapted_linear(gated.forward(adapted_linear(x, gate), adapted_linear(x, up)), down)


def shared_linear(x: Tensor, layers: Sequence[Linear], *, normed: Normed | None = None) -> tuple[Tensor, ...]:
    """`adapted_linear` of each of the layers that read one x (T, in): (T, out) each."""
    outputs: tuple[Tensor, ...] = _SharedLinear.apply(x, tuple(layers), normed, *_trained(layers))
    return outputs


def gated_mlp(
    x: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    gated: Gated,
    *,
    recompute: bool = False,
    normed: Normed | None = None,
) -> Tensor:
    """`gated_mlp_plain`; with `recompute`, what gate and up give is computed again in the backward."""
    layers = (gate, up, down)
    output: Tensor = _GatedMlp.apply(x, layers, gated, recompute, normed, *_trained(layers))
    return output


class _Norm(torch.autograd.Function):
    @staticmethod
    @own_outputs
    @without_autocast
    def forward(ctx, x, norm):  # type: ignore[no-untyped-def]
        y, rstd = norm.elementwise.rms_norm(x, norm.weight, norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        x, rstd = ctx.saved_tensors
        return ctx.norm.elementwise.rms_norm_backward(upstream, x, ctx.norm.weight, rstd), None


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    @own_outputs
    @without_autocast
    def forward(ctx, x, layers, normed, *trained):  # type: ignore[no-untyped-def]
        outputs, small = _project(x, layers, _weights(layers, x.dtype))
        ctx.layers, ctx.norm = layers, normed and normed.norm
        ctx.save_for_backward(_kept(x, normed) if trained else None, small, *trained)
        return tuple(outputs)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, *upstream):  # type: ignore[no-untyped-def]
        kept, small, *_ = ctx.saved_tensors  # the trained ones only so that a step in between is noticed
        weights = _weights(ctx.layers, small.dtype) if ctx.needs_input_grad[0] else None
        to_x, to_small = _towards(upstream, ctx.layers, weights)
        gradients = _gradients(upstream, to_small, _restored(kept, ctx.norm), small, ctx.layers)
        return to_x, None, None, *gradients


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    @own_outputs
    @without_autocast
    def forward(ctx, x, layers, gated, recompute, normed, *trained):  # type: ignore[no-untyped-def]
        pair, down = layers[:2], layers[2:]
        (gate, up), small = _project(x, pair, _weights(pair, x.dtype))
        (output,), small_down = _project(gated.forward(gate, up), down, _weights(down, x.dtype))
        ctx.layers, ctx.gated, ctx.recompute, ctx.norm = layers, gated, recompute, normed and normed.norm
        kept = _kept(x, normed) if recompute or small.shape[1] else None
        inner = (None, None) if recompute else (gate, up)
        ctx.save_for_backward(kept, small, small_down, *inner, *trained)
        return output

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        kept, small, small_down, gate, up, *_ = ctx.saved_tensors
        pair, down = ctx.layers[:2], ctx.layers[2:]
        x = _restored(kept, ctx.norm)
        weights: Iterable[Tensor] = _weights(pair, small.dtype)
        if ctx.recompute and x is not None:
            weights = list(weights)  # for both directions
            (gate, up), _ = _project(x, pair, weights, small)
        to_inner, to_small_down = _towards((upstream,), down, _weights(down, small.dtype))
        inner, *to_pair = ctx.gated.backward_(to_inner, gate, up)
        gradients_down = _gradients((upstream,), to_small_down, inner, small_down, down)
        del gate, up, to_inner, inner
        to_x, to_small = _towards(to_pair, pair, weights if ctx.needs_input_grad[0] else None)
        gradients = _gradients(to_pair, to_small, x, small, pair)
        return to_x, None, None, None, None, *gradients, *gradients_down


def _trained(layers: Sequence[Linear]) -> list[Tensor]:
    return [tensor for layer in layers if layer.adapter for tensor in (layer.adapter.a, layer.adapter.b)]


def _weights(layers: Sequence[Linear], dtype: torch.dtype) -> Iterator[Tensor]:
    """One weight (out, in) after the other, so that no two de-quantised ones need be alive."""
    return (layer.weight(dtype) for layer in layers)


def _kept(x: Tensor, normed: Normed | None) -> Tensor:
    return x if normed is None else normed.source


def _restored(kept: Tensor | None, norm: Norm | None) -> Tensor | None:
    return kept if kept is None or norm is None else norm.again(kept)


def _stacked(layers: Sequence[Linear], like: Tensor) -> Tensor:
    """The A of all adapters, (sum of R, in), in the dtype of `like`."""
    return _joined([layer.adapter.a for layer in layers if layer.adapter], dim=0).to(like.dtype)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side; one by itself is not copied."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _scaled_(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _project(
    x: Tensor, layers: Sequence[Linear], weights: Iterable[Tensor], small: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """What each layer gives, (T, out), and `small` = x A^T of all adapters side by side, (T, sum of R)."""
    ranks = [layer.rank for layer in layers]
    if small is None:
        small = linear(x, _stacked(layers, x)) if any(ranks) else x.new_empty(x.shape[0], 0)
    outputs = []
    for layer, weight, part in zip(layers, weights, small.split(ranks, dim=1), strict=True):
        y = linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
        if layer.adapter is not None:
            y.addmm_(part, layer.adapter.b.to(x.dtype).T, alpha=layer.adapter.scale)
        outputs.append(y)
    return outputs, small


def _towards(
    upstream: Sequence[Tensor], layers: Sequence[Linear], weights: Iterable[Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients towards x, (T, in), where `weights` are given, and towards `small`, (T, sum of R)."""
    to_x: Tensor | None = None
    for gradient, weight in zip(upstream, () if weights is None else weights, strict=False):
        to_x = gradient @ weight if to_x is None else to_x.addmm_(gradient, weight)
    parts = [
        (gradient @ layer.adapter.b.to(gradient.dtype), layer.adapter.scale)
        for gradient, layer in zip(upstream, layers, strict=True)
        if layer.adapter
    ]
    if not parts:
        return to_x, None
    scales = {scale for _, scale in parts}
    if len(scales) == 1:  # one launch for all
        to_small = _scaled_(_joined([part for part, _ in parts], dim=1), *scales)
    else:
        to_small = torch.cat([_scaled_(part, scale) for part, scale in parts], dim=1)
    if to_x is not None:
        to_x.addmm_(to_small, _stacked(layers, to_small))
    return to_x, to_small


def _gradients(
    upstream: Sequence[Tensor], to_small: Tensor | None, x: Tensor | None, small: Tensor, layers: Sequence[Linear]
) -> list[Tensor]:
    """Gradients of A and B of each adapter, in the order of `_trained`, in the dtype of the masters."""
    if to_small is None or x is None:
        return []
    ranks = [layer.rank for layer in layers]
    to_a = wide_product(to_small.T, x).split(ranks)
    gradients = []
    for gradient, a, part, layer in zip(upstream, to_a, small.split(ranks, dim=1), layers, strict=True):
        if layer.adapter is not None:
            b = _scaled_(wide_product(gradient.T, part), layer.adapter.scale)
            gradients += [a.to(layer.adapter.a.dtype), b.to(layer.adapter.b.dtype)]
    return gradients


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a result in fp32 or wider, summed so; CUDA takes bf16 factors as they are."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)
