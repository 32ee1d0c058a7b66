"""What stands in for the forward of a module in a fused policy: `model.fused` decides where.

Each call reads the module and its adapters as they are then, so switching, exchanging, merging and unloading adapters
work as ever. What the fused functions do not compute, PEFT's own forward does: `read` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafocal.model.quantized import library, word_of
from lorafocal.ops.elementwise import Elementwise, Gated
from lorafocal.ops.lora import Adapter, Linear, Norm, Normed, gated_mlp, shared_linear
from lorafocal.ops.rotary import rotated


class Arithmetic(NamedTuple):
    """What a call computes in."""

    dtype: torch.dtype
    casts: bool  # autocast: weights and adapters may be held in another dtype

    @classmethod
    def of(cls, x: Tensor) -> Arithmetic | None:
        """None where PEFT must compute: fp16, and integers."""
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16)
        dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
        return cls(dtype, casts) if dtype in (torch.bfloat16, torch.float32, torch.float64) else None


def read(layer: nn.Module, arithmetic: Arithmetic) -> Linear | str:
    """A linear layer with or without PEFT's adapter as it computes now, or why PEFT must compute it, in plain words."""
    if not isinstance(layer, LoraLayer):
        return _read_base(layer, None, arithmetic)
    if word_of(layer.get_base_layer()) == "int8":
        return _INT8
    if type(layer) is not LoraLinear and type(layer).__name__ != "Linear4bit":
        return f"an adapter of PEFT's class {type(layer).__name__}"
    if layer.merged:
        return "a merged adapter"
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return "several active adapters"
    adapter = _read_adapter(layer, active[0], arithmetic) if active else None
    return adapter if isinstance(adapter, str) else _read_base(layer.get_base_layer(), adapter, arithmetic)


def _read_adapter(layer: Any, name: str, arithmetic: Arithmetic) -> Adapter | str:
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if variant := layer.lora_variant.get(name):
        return f"another kind of adapter ({type(variant).__name__.removesuffix('LinearVariant')})"
    if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", None) != 0:
        return "dropout"
    if a.bias is not None or b.bias is not None:
        return "a bias in the adapter"
    if _watched(a) or _watched(b):
        return _HOOKS
    if not arithmetic.casts and {a.weight.dtype, b.weight.dtype} != {arithmetic.dtype}:
        return "adapters in another dtype than the base, without autocast"
    return Adapter(a.weight, b.weight, layer.scaling[name])


def _read_base(base: nn.Module, adapter: Adapter | None, arithmetic: Arithmetic) -> Linear | str:
    weight: Any = getattr(base, "weight", None)
    bias: Any = getattr(base, "bias", None)
    word = word_of(base)
    if word == "int8":
        return _INT8
    if word is None and type(base) not in (nn.Linear, Conv1D):
        return f"a layer of class {type(base).__name__}"
    if word is None and (type(weight) is not nn.Parameter or weight.ndim != 2):
        return "weights that are not here as one matrix"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "weights that are trained"
    if _watched(base):
        return _HOOKS
    held = weight.quant_state.dtype if word else weight.dtype
    if not arithmetic.casts and held != arithmetic.dtype:
        return f"weights in {str(held).removeprefix('torch.')} without autocast"
    return Linear(partial(_dense, base), bias, adapter)


_INT8 = "a base in int8, which rounds its inputs"
_HOOKS = "hooks on parts of the layer"


def _watched(module: nn.Module) -> bool:
    """Whether somebody relies on this module being called, which the fused functions do not do."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _dense(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a layer multiplies by, in `dtype`."""
    weight: Any = base.weight
    if getattr(weight, "quant_state", None) is not None:
        weight = library().functional.dequantize_4bit(weight.data, weight.quant_state)
    dense: Tensor = (weight.T if isinstance(base, Conv1D) else weight).to(dtype)
    return dense


class StandIn:
    """In place of one module's forward, as a bound method: a deep copy of the model takes it along."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def install(self) -> None:
        self.module.forward = self.forward

    @staticmethod
    def of(module: nn.Module) -> StandIn | None:
        """What stands in for this module's forward, if anything does."""
        stand_in = getattr(vars(module).get("forward"), "__self__", None)
        return stand_in if isinstance(stand_in, StandIn) else None

    @staticmethod
    def remove(module: nn.Module) -> None:
        if StandIn.of(module):
            del module.forward

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """The module's own forward for a decoding step and for arguments that the fused one does not know."""
        decoding = x.ndim == 3 and x.shape[1] == 1
        result = None if arguments or named or decoding else self.fused(x)
        return self.own(x, *arguments, **named) if result is None else result

    def own(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        output: Tensor = type(self.module).forward(self.module, x, *arguments, **named)
        return output

    def fused(self, x: Tensor) -> Tensor | None:
        """None where the module as it is now is not for this function."""
        raise NotImplementedError


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _widened(weight: Tensor) -> Tensor:
    return weight.float()


def _above_one(weight: Tensor) -> Tensor:
    return weight.float() + 1


# Of Llama, Mistral and Qwen; of OLMo 2; of Gemma. Functions with a name, so that a fused model can be pickled.
NORM_FORMS: tuple[Callable[[Tensor], Tensor], ...] = (_as_it_is, _widened, _above_one)


class FusedNorm(StandIn):
    """A frozen RMS norm; `form` makes the weight that `elementwise.rms_norm` takes of the module's own."""

    def __init__(self, module: nn.Module, form: Callable[[Tensor], Tensor], eps: float, functions: Elementwise) -> None:
        super().__init__(module)
        self.form, self.eps, self.functions = form, eps, functions

    def fused(self, x: Tensor) -> Tensor | None:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if weight.requires_grad or x.dtype != weight.dtype:
            return None
        normed = Normed(_rows(x), Norm(self.form(weight), self.eps, self.functions))
        y = normed.norm(normed.source).view(x.shape)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y._lorafocal_normed = normed, _versions(y, normed)  # type: ignore[attr-defined]
        return y


def _versions(y: Tensor, normed: Normed) -> tuple[int, int]:
    """These change with writes in place, after which `y` is no longer what the norm computes again."""
    return y._version, normed.source._version


def _normed(x: Tensor, dtype: torch.dtype) -> Normed | None:
    """The norm that `x` is the output of, if it is one that can be computed again."""
    normed, versions = getattr(x, "_lorafocal_normed", (None, None))
    return normed if normed and x.dtype == dtype and versions == _versions(x, normed) else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class FusedMlp(StandIn):
    """A gated MLP block; `names` are those of its gate, up and down layers."""

    def __init__(self, module: nn.Module, names: Sequence[str], gated: Gated, *, recompute: bool) -> None:
        super().__init__(module)
        self.names, self.gated, self.recompute = tuple(names), gated, recompute

    def fused(self, x: Tensor) -> Tensor | None:
        arithmetic = Arithmetic.of(x)
        layers = self.read(arithmetic) if arithmetic else "fp16"
        if isinstance(layers, str) or arithmetic is None:
            return None
        gate, up, down = layers
        rows, normed = _rows(x.to(arithmetic.dtype)), _normed(x, arithmetic.dtype)
        output = gated_mlp(rows, gate, up, down, self.gated, recompute=self.recompute, normed=normed)
        return output.view(*x.shape[:-1], output.shape[-1])

    def read(self, arithmetic: Arithmetic) -> list[Linear] | str:
        """Its three layers, or why one of them is not for the fused function."""
        found = []
        if any(map(_watched, self.module.children())):
            return _HOOKS
        for name in self.names:
            linear = read(getattr(self.module, name), arithmetic)
            if isinstance(linear, str):
                return linear
            found.append(linear)
        return found


class _Waiting(NamedTuple):
    output: Tensor
    linear: Linear  # as it was read
    x: Tensor
    versions: tuple[int, ...]  # of x and the adapter: these change with writes in place
    grad: bool
    dtype: torch.dtype


class SharedInput:
    """Layers that read one tensor: the first that is called computes for all, the others pick their results up.

    Results are handed out for the same tensor object, unchanged, and the same adapters only. Where they are left lying
    twice in a row, the layers do not share their input, and each computes for itself from then on.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self._waiting: dict[int, _Waiting] = {}
        self._left_lying = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_waiting": {}}  # a copy of the model takes no part in the pass that is under way

    def forget(self) -> None:
        """Nothing is waiting any more: the pass that computed it has broken off."""
        self._waiting = {}

    def of(self, position: int, x: Tensor) -> Tensor | None:
        """What layer `position` gives for x; None where PEFT must compute."""
        arithmetic = Arithmetic.of(x)
        linear = read(self.layers[position], arithmetic) if arithmetic else "fp16"
        if isinstance(linear, str) or arithmetic is None:
            return None
        if torch.compiler.is_compiling() or x.is_inference():
            # no handing over from call to call: tracing knows none, and writes into x would go unnoticed
            return self._together({position: linear}, x, arithmetic)[0]
        waiting = self._waiting.pop(position, None)
        if waiting is not None and self._fits(waiting, linear, x, arithmetic.dtype):
            self._left_lying = 0
            return waiting.output
        return self._compute(position, linear, x, arithmetic)

    @staticmethod
    def _fits(waiting: _Waiting, linear: Linear, x: Tensor, dtype: torch.dtype) -> bool:
        then, now = waiting.linear.adapter, linear.adapter
        same = (then and id(then.a)) == (now and id(now.a)) and x is waiting.x
        return same and (_written(x, linear), torch.is_grad_enabled(), dtype) == waiting[3:]

    def _compute(self, position: int, linear: Linear, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        if self._waiting:
            self._left_lying, self._waiting = self._left_lying + 1, {}
        members = {position: linear}
        if self._left_lying < 2:
            others = {i: read(layer, arithmetic) for i, layer in enumerate(self.layers) if i != position}
            members |= {i: other for i, other in others.items() if not isinstance(other, str)}
        first, *rest = self._together(members, x, arithmetic)
        for (i, member), output in zip(list(members.items())[1:], rest, strict=True):
            state = (_written(x, member), torch.is_grad_enabled(), arithmetic.dtype)
            self._waiting[i] = _Waiting(output, member, x, *state)
        return first

    @staticmethod
    def _together(members: dict[int, Linear], x: Tensor, arithmetic: Arithmetic) -> list[Tensor]:
        rows, normed = _rows(x.to(arithmetic.dtype)), _normed(x, arithmetic.dtype)
        outputs = shared_linear(rows, list(members.values()), normed=normed)
        return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _written(x: Tensor, linear: Linear) -> tuple[int, ...]:
    """How often what a layer computes with was written into."""
    tensors = (x,) if linear.adapter is None else (x, linear.adapter.a, linear.adapter.b)
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class FusedLinear(StandIn):
    """One of the layers of a `SharedInput`, which may be the only one."""

    def __init__(self, shared: SharedInput, position: int) -> None:
        super().__init__(shared.layers[position])
        self.shared, self.position = shared, position

    def fused(self, x: Tensor) -> Tensor | None:
        return self.shared.of(self.position, x)


ROTARY = "apply_rotary_pos_emb"  # how attention code calls it in nearly every family of transformers


class FusedRotary(StandIn):
    """An attention block: its own code, which finds another function under the name of its rotary embedding."""

    def __init__(self, module: nn.Module, functions: Elementwise) -> None:
        super().__init__(module)
        self.functions = functions
        self.copy = _with_rotary(type(module).forward, functions)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "functions": self.functions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.copy = _with_rotary(type(self.module).forward, self.functions)

    @staticmethod
    def own_function(module: nn.Module) -> Callable[..., Any] | None:
        """The rotary embedding that the module's forward calls, if it calls one by this name."""
        forward: Any = type(module).forward
        called = getattr(getattr(forward, "__code__", None), "co_names", ())
        return forward.__globals__.get(ROTARY) if ROTARY in called else None

    def forward(self, *given: Any, **named: Any) -> Any:
        # a compiler writes its own kernel, and would look names up in the module that the copy says it is from
        forward = type(self.module).forward if torch.compiler.is_compiling() else self.copy
        return forward(self.module, *given, **named)


def _with_rotary(forward: Any, functions: Elementwise) -> Callable[..., Any]:
    """A copy of an attention's forward that turns queries and keys by `rotated`."""
    names = forward.__globals__ | {ROTARY: partial(rotary, forward.__globals__[ROTARY], functions)}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def rotary(
    own: Callable[..., Any],
    functions: Elementwise,
    *given: Tensor,
    **named: Any,
) -> Any:
    """Queries (B, H, T, D) and keys (B, H_kv, T, D) turned by cos and sin, (1 or B, T, D).

    By `own` where it is asked for something else: one of them, other axes, a part of the width, two dtypes.
    """
    if named or len(given) != 4:
        return own(*given, **named)
    query, key, cos, sin = given
    fits = query.ndim == 4 and key.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
    fits = fits and query.shape[-1] == key.shape[-1] == cos.shape[-1] and query.shape[2] == key.shape[2] == cos.shape[1]
    fits = fits and query.shape[0] == key.shape[0] and cos.shape[0] in (1, query.shape[0])
    fits = fits and query.dtype == key.dtype == cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)
    if not fits:
        return own(*given)
    return rotated(query, cos, sin, functions), rotated(key, cos, sin, functions)
