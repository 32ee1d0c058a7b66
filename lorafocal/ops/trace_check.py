"""Whether torch.compile computes the fused functions as they are: values and gradients of small ones, both ways.

Dynamo writes the backward of an autograd function anew, and a version of torch that does so wrongly says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lorafocal.ops.elementwise import Elementwise, Gated
from lorafocal.ops.kernel_check import furthest, largest
from lorafocal.ops.lora import Adapter, Linear, Norm, gated_mlp, shared_linear

_TOKENS, _WIDTH, _INNER, _RANK = 3, 8, 12, 2


@cache
def traced_norm(functions: Elementwise, dtype: torch.dtype, device: torch.device) -> float:
    """How far compiled ones are off: the largest of a row, as `furthest` tells it. Found once a process."""

    def call(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [Norm(weight, 1e-5, functions)(x)]

    x, weight = _draw([(_TOKENS, _WIDTH), (_WIDTH,)], dtype, device)
    return _apart(call, [x.requires_grad_(), weight])


@cache
def traced_linears(dtype: torch.dtype, device: torch.device) -> float:
    def call(x: Tensor, *parts: Tensor) -> list[Tensor]:
        return list(shared_linear(x, _layers(parts)))

    return _with_adapters(call, [(_INNER, _WIDTH), (_WIDTH, _WIDTH)], dtype, device)


@cache
def traced_mlp(gated: Gated, recompute: bool, dtype: torch.dtype, device: torch.device) -> float:
    def call(x: Tensor, *parts: Tensor) -> list[Tensor]:
        gate, up, down = _layers(parts)
        return [gated_mlp(x, gate, up, down, gated, recompute=recompute)]

    return _with_adapters(call, [(_INNER, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER)], dtype, device)


def _with_adapters(
    call: Callable[..., list[Tensor]], sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> float:
    """Of a function of layers of these sizes, (out, in); the first layer's x needs no gradient, all others' do."""
    wide = torch.promote_types(dtype, torch.float32)
    x, *weights = _draw([(_TOKENS, _WIDTH), *sizes], dtype, device)
    adapters = _draw([shape for out, width in sizes for shape in ((_RANK, width), (out, _RANK))], wide, device)
    a, b = adapters[::2], adapters[1::2]
    parts = [part for layer in zip(weights, a, b, strict=True) for part in layer]
    for tensor in adapters:
        tensor.requires_grad_()
    return largest(_apart(call, [x.detach().requires_grad_(need), *parts]) for need in (False, True))


def _apart(call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> float:
    return furthest(_results(torch.compile(call, dynamic=False, backend="aot_eager"), inputs), _results(call, inputs))


def _results(call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Its outputs, and gradients towards the inputs that need one."""
    outputs = call(*inputs)
    upstream = [torch.arange(1, 1 + y.numel(), dtype=y.dtype, device=y.device).view_as(y).cos() for y in outputs]
    to_inputs = torch.autograd.grad(outputs, [one for one in inputs if one.requires_grad], upstream)
    return [*(y.detach() for y in outputs), *to_inputs]


def _layers(parts: tuple[Tensor, ...]) -> list[Linear]:
    """Of weight, A, B of one layer after the other; made where it is traced, as a model's layers are."""
    threes = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [Linear(partial(_held, weight), None, Adapter(a, b, 2.0)) for weight, a, b in threes]


def _held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype)


def _draw(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Always the same numbers; the process's own generator is left alone."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
