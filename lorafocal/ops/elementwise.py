"""The functions of a decoder layer that multiply no matrices: their definitions in torch, and which set to use.

`TORCH` holds the definitions; `load("triton")` gives kernels of the same signatures. Forward values round where
transformers' own modules do (after the activation, after the normalisation), so a fused layer is the base's to the
last bit wherever torch computes both. A name that ends in `_` may overwrite what its docstring names.
Rows are tokens: T tokens, F the inner width, D the hidden width or that of a head, H heads, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from lorafocal.errors import InputError
from lorafocal.ops.logps import HeadFold, head_fold_


@dataclass(frozen=True, slots=True)
class Gated:
    """activation(gate) * up, and its gradients from (upstream, gate, up); `backward_` overwrites upstream."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One set of these functions; see the definition of the same name for what each computes."""

    name: str
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward_: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    rope_backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    head_fold_: HeadFold
    failures: tuple[type[Exception], ...] = (RuntimeError,)  # that say that they cannot be compiled or run here

    @property
    def gated(self) -> Gated:
        """SwiGLU; `GEGLU` is Gemma's, of which there is no other set."""
        return Gated(self.swiglu, self.swiglu_backward_)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (T, F): silu in fp32 or wider, rounded to the inputs' dtype before the product."""
    return silu(gate) * up


def swiglu_backward_(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(swiglu(gate, up), to_gate, to_up), each (T, F) in the inputs' dtype. Overwrites `upstream`."""
    activated = silu(gate)
    to_activated = upstream * up
    to_gate = torch.ops.aten.silu_backward.grad_input(to_activated, gate, grad_input=to_activated)
    to_up = upstream.mul_(activated)
    return activated.mul_(up), to_gate, to_up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, (T, F), gelu by tanh and rounded as in `swiglu`."""
    return gelu(gate, approximate="tanh") * up


def geglu_backward_(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(geglu(gate, up), to_gate, to_up), each (T, F) in the inputs' dtype. Overwrites `upstream`."""
    activated = gelu(gate, approximate="tanh")
    to_gate = torch.ops.aten.gelu_backward(upstream * up, gate, approximate="tanh")
    to_up = upstream.mul_(activated)
    return activated.mul_(up), to_gate, to_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y (T, D) in x's dtype, rstd (T,) fp32 or wider) for x (T, D) and a frozen weight (D,).

    x * rstd is computed in fp32 or wider, rounded to the weight's dtype, multiplied by it, then rounded to x's dtype:
    a weight in x's dtype gives Llama's norm, one in fp32 OLMo 2's, 1 + weight in fp32 Gemma's.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[:, None]).to(weight.dtype).mul_(weight).to(x.dtype), rstd


def rms_norm_backward(upstream: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Gradient towards x, (T, D) in x's dtype, computed in rstd's."""
    normal = x.to(rstd.dtype) * rstd[:, None]
    to_normal = upstream.to(rstd.dtype) * weight
    along = (to_normal * normal).mean(-1, keepdim=True)
    return to_normal.sub_(normal.mul_(along)).mul_(rstd[:, None]).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D) turned by cos, sin (T, D), in x's dtype; halves are paired, as transformers' `rotate_half` does."""
    half, sin = x.shape[-1] // 2, sin[:, None]
    turned = x * cos[:, None]
    turned[..., :half].sub_(x[..., half:] * sin[..., :half])
    turned[..., half:].add_(x[..., :half] * sin[..., half:])
    return turned


def rope_backward(upstream: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient towards x, (T, H, D): the transpose of `rope`, whatever cos and sin hold."""
    half, sin = upstream.shape[-1] // 2, sin[:, None]
    to_x = upstream * cos[:, None]
    to_x[..., :half].add_(upstream[..., half:] * sin[..., half:])
    to_x[..., half:].sub_(upstream[..., :half] * sin[..., :half])
    return to_x


GEGLU = Gated(geglu, geglu_backward_)
TORCH = Elementwise("torch", swiglu, swiglu_backward_, rms_norm, rms_norm_backward, rope, rope_backward, head_fold_)


def load(name: str) -> Elementwise:
    """The set called "torch" or "triton". Raises InputError for another name, and where Triton cannot run."""
    if name == "torch":
        return TORCH
    if name != "triton":
        raise InputError(f"kernels.elementwise: {name!r} is unknown; choose torch or triton")
    if not torch.cuda.is_available():
        raise InputError("kernels.elementwise: triton needs a CUDA device and there is none here: use torch")
    try:
        module = importlib.import_module("lorafocal.ops.triton")
    except ImportError as error:
        raise InputError(
            f"kernels.elementwise: Triton cannot be imported ({error}): `pip install triton`, or use torch"
        ) from error
    found: Elementwise = module.TRITON
    return found
