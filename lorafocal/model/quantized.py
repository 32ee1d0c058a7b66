"""Bases held in 4 or 8 bits by bitsandbytes: how they are asked for, made safe to train, and checked after loading.

bitsandbytes is the extra `quant`, so nothing here imports it before it is needed. What one layer does is settled by
`settle`; what a whole model turned out to be is stated by `describe` and held against the plan by `check_loaded`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lorafocal.compatibility import QUANTIZED, quantized_word, stored_as
from lorafocal.errors import InputError, first_line, ran_out
from lorafocal.model.adapters import LINEAR, linear_names
from lorafocal.model.head import causal_lm
from lorafocal.model.trained_modules import embeddings_of
from lorafocal.tensor_files import dtype_word

MOSTLY = 0.9  # share of the inner weights that must be quantised: routers and convolutions are far below the rest


def bitsandbytes_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is to quantise with, computing in `dtype`.

    Raises InputError for an unknown word, and where bitsandbytes is missing or broken.
    """
    if quantization not in QUANTIZED:
        raise InputError(f"model.quantization: {quantization!r} is unknown; choose one of {', '.join(QUANTIZED)}")
    library()
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    kind, _, double = quantization.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double == "double",
        bnb_4bit_compute_dtype=dtype,
    )


def library(device: torch.device | None = None) -> ModuleType:
    """bitsandbytes, tried on `device`. Raises InputError where it is missing or does not work there."""
    try:
        module = importlib.import_module("bitsandbytes")
        if device is not None:
            module.functional.quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if ran_out(error):
            raise
        reason = first_line(error)
        raise InputError(
            f"a base in 4 or 8 bits needs bitsandbytes, which does not work here ({reason}): install it with"
            " `pip install 'lorafocal[quant]'`, or train on a float base (without `model.quantization`)"
        ) from error
    return module


def prequantized(config: object, name: str) -> str | None:
    """The word for what a checkpoint's config says that its weights are quantised as; None for a float one.

    Raises InputError for every method but bitsandbytes.
    """
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    return stored_as(dict(stated) if isinstance(stated, Mapping) else stated.to_dict(), name)


def quantization_of(model: nn.Module) -> str | None:
    """How the linear layers of `model` are held, read from the layers themselves; None where all are float.

    Raises InputError for a mixture, for weights without their scales and for other methods than bitsandbytes.
    """
    base = causal_lm(model)
    words = {word_of(module) for module in base.modules()} - {None}
    if len(words) > 1:
        raise InputError(
            f"the model holds its layers in a mixture of {' and '.join(sorted(map(str, words)))}: load it with one"
            " quantisation"
        )
    if words:
        return words.pop()
    if (method := getattr(base, "quantization_method", None)) is not None:
        raise InputError(
            f"the model was loaded with {getattr(method, 'value', method)}, and none of its layers is held by"
            " bitsandbytes: load its float original, with `lorafocal.load_base(name, quantization='nf4')` in 4 bits"
        )
    return None


def word_of(layer: nn.Module) -> str | None:
    """The word for one layer; None where it is not quantised. Raises InputError where its scales are missing."""
    if _is_eight_bit(layer):
        scales = getattr(layer.weight, "SCB", None)  # a plain parameter where transformers had nothing to quantise
        if layer.weight.dtype != torch.int8 or (scales is None and layer.state.SCB is None):  # type: ignore[union-attr]
            raise InputError(f"an 8-bit layer has no quantised weight: {_BROKEN}")
        return "int8"
    if not _is_four_bit(layer):
        return None
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise InputError(f"a 4-bit layer has no scales: {_BROKEN}")
    return quantized_word(state.quant_type, state.nested)


_BROKEN = "the checkpoint is damaged or was not written by `save_pretrained`; quantise its float original on loading"


def _is_four_bit(layer: nn.Module) -> bool:
    known = sys.modules.get("bitsandbytes")  # nothing can be a layer of a library that nobody imported
    return known is not None and isinstance(layer, known.nn.Linear4bit)


def _is_eight_bit(layer: nn.Module) -> bool:
    known = sys.modules.get("bitsandbytes")
    return known is not None and isinstance(layer, known.nn.Linear8bitLt)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype a base was loaded in: that of its embeddings, whatever trained copies of them there are."""
    return embeddings_of(causal_lm(model)).weight.dtype


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a model holds in float (if quantised: norms, embeddings, head, biases); codes and buffers stay."""
    for module in model.modules():
        held = word_of(module) is not None
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (held and name == "weight"):
                parameter.data = parameter.data.to(dtype)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model; `nn.Module.to` leaves where they were the codes and scales that an 8-bit layer computes with."""
    model.to(device)
    for layer in filter(_is_eight_bit, model.modules()):
        holders: tuple[Any, ...] = (layer.weight, layer.state)  # the second from the first forward on
        for holder in holders:
            if getattr(holder, "CB", None) is not None:
                holder.CB = layer.weight.data
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(device)


def settle(model: nn.Module) -> None:
    """Make the quantised layers of `model` compute one thing, in training and evaluation, alone and in a pack.

    - 4 bit on a CPU with avx512_bf16: an evaluation would repack the weights for kernels without gradients, for good.
    - 4 bit: compute, and de-quantise for the gradient, in the base's own dtype, whatever the checkpoint says.
    - int8: no outlier columns, which are chosen over a whole batch (docs/decisions/0006), and one forward: on a CPU
      bitsandbytes rounds activations to 8 bits in evaluation mode, and not in training mode.

    Nothing is done to a float model, nor by a second call. Raises InputError where weights are repacked already.
    """
    dtype = base_dtype(model)
    for name, layer in causal_lm(model).named_modules():
        if _is_four_bit(layer):
            _settle_four_bit(layer, name, dtype)
        elif _is_eight_bit(layer):
            _settle_eight_bit(layer, name)


def _settle_four_bit(layer: Any, name: str, dtype: torch.dtype) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise InputError(
            f"{name}: bitsandbytes has repacked the 4-bit weights for inference on this CPU, and gradients through them"
            " would be wrong: load the model again (`lorafocal.load_base`) and hand it over before any forward pass"
        )
    layer.support_avx512bf16_for_cpu = False
    layer.compute_dtype, layer.compute_type_is_set = dtype, True
    if state is not None:
        state.dtype = dtype


def _settle_eight_bit(layer: Any, name: str) -> None:
    if layer.state.has_fp16_weights:
        raise InputError(f"{name} keeps float16 weights (llm_int8_has_fp16_weight): load the model without that option")
    layer.state.threshold = 0.0
    layer.training = True
    layer.train = lambda mode=True: layer


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in) in float32 that a linear layer multiplies by, be it 4-bit, 8-bit or float.

    An adapter around the layer is not part of it.
    """
    plain: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]
    weight = plain.weight
    if _is_four_bit(plain):
        return library().functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if _is_eight_bit(plain):
        scales = plain.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scales[:, None] * (1 / 127))
    return (weight.T if isinstance(plain, Conv1D) else weight).detach().float()


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """What a base turned out to be: its text part, counted after loading. Dtypes are names, "a and b" where mixed."""

    quantization: str | None
    dtype: str
    quantized_layers: int  # linear layers of the text part, its output head not among them
    float_layers: int
    quantized_share: float  # of the text part's weights that are neither embeddings nor head
    norms: str  # and whatever else is no linear layer
    embeddings: str
    head: str
    attention: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        held = f"{self.float_layers} linear layers in float"
        if self.quantization is not None:
            held = f"{self.quantized_layers} linear layers in {self.quantization}, {held}"
            held += f" ({self.quantized_share:.1%} of the inner weights are quantised)"
        return (
            f"base: computes in {self.dtype}; {held}; norms {self.norms}, embeddings {self.embeddings},"
            f" head {self.head}; attention {self.attention}"
        )


def describe(model: nn.Module) -> LoadedBase:
    """What `model` is, read from its modules before an adapter is attached. Raises InputError for a mixture."""
    base: Any = causal_lm(model)
    modules = dict(base.named_modules())
    linear = linear_names(base)
    quantized = [name for name in linear if word_of(modules[name]) is not None]
    sizes = inner_weights(base)
    apart = {*linear, *(name for name, module in modules.items() if isinstance(module, nn.Embedding))}
    text, head = set(base.get_decoder().modules()), base.get_output_embeddings()
    norms = [
        parameter
        for name, module in modules.items()
        if module in text and name not in apart and module is not head
        for parameter in module.parameters(recurse=False)
    ]
    return LoadedBase(
        quantization=quantization_of(base),
        dtype=_named([base.get_input_embeddings().weight]),
        quantized_layers=len(quantized),
        float_layers=len(linear) - len(quantized),
        quantized_share=sum(size for name, size in sizes.items() if name in quantized) / max(1, sum(sizes.values())),
        norms=_named(norms),
        embeddings=_named([base.get_input_embeddings().weight]),
        head=_named([head.weight]),
        attention=base.config.get_text_config()._attn_implementation,
    )


def _named(tensors: Iterable[Tensor]) -> str:
    """The dtypes of tensors in words."""
    return " and ".join(sorted({dtype_word(tensor.dtype) for tensor in tensors})) or "none"


def inner_weights(base: Any) -> dict[str, int]:
    """Entries of each matrix of the text part but embeddings and head: a linear layer by its own name, else in full.

    Experts that an architecture keeps in one tensor are such matrices, and are no linear layers.
    """
    text, head = set(base.get_decoder().modules()), base.get_output_embeddings()
    sizes = {}
    for name, module in base.named_modules():
        if module not in text or module is head or isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, LINEAR) and leaf == "weight"
            if linear or parameter.ndim > 1:
                state = getattr(parameter, "quant_state", None)
                sizes[name if linear else f"{name}.{leaf}"] = (
                    parameter.numel() if state is None else state.shape.numel()
                )
    return sizes


def check_loaded(model: nn.Module, *, quantization: str | None, dtype: torch.dtype) -> LoadedBase:
    """Hold what was loaded against what was asked for: `quantization` (None: a float base) and `dtype`.

    A quantised base must hold every linear layer of its text part so, but those that its own checkpoint names as left
    in float, and nearly all of its inner weights. Embeddings and head stay in `dtype`. Raises InputError.
    """
    base: Any = causal_lm(model)
    if quantization is not None:
        _check_coverage(base, quantization)
    found = describe(base)
    kind, wanted = type(base).__name__, dtype_word(dtype)
    if found.quantization != quantization:
        raise InputError(
            f"model.quantization: {quantization or 'none'} was asked for, but {kind} was loaded with"
            f" {found.quantization or 'all layers in float'}. {_LEAVE_OUT}"
        )
    if {found.embeddings, found.head} != {wanted}:
        raise InputError(
            f"model.dtype: {wanted} was asked for, but {kind} has embeddings in {found.embeddings} and its head in"
            f" {found.head}: use its float original"
        )
    return found


def _check_coverage(base: Any, quantization: str) -> None:
    modules, sizes, kept = dict(base.named_modules()), inner_weights(base), _kept_in_float(base)
    left = {
        name: size
        for name, size in sizes.items()
        if (name not in modules or word_of(modules[name]) is None)
        and not any(f".{skipped}." in f".{name}." for skipped in kept)
    }
    layers = [name for name in left if name in modules]
    share = sum(left.values()) / sum(sizes.values())
    if layers or share > 1 - MOSTLY:
        raise InputError(
            f"model.quantization: {quantization} was asked for, but {share:.0%} of the inner weights of"
            f" {type(base).__name__} stayed in float (such as {max(layers or left, key=left.__getitem__)}):"
            " bitsandbytes does not"
            f" quantise {'layers of that kind' if layers else 'experts kept in one tensor'}. {_LEAVE_OUT}"
        )


_LEAVE_OUT = "Leave `model.quantization` out, or use another model"


def _kept_in_float(base: Any) -> list[str]:
    """The modules that a checkpoint quantised by others names as left in float on purpose."""
    stated = getattr(base.config, "quantization_config", None)
    stated = stated if isinstance(stated, Mapping) else vars(stated) if stated is not None else {}
    return stated.get("llm_int8_skip_modules") or []
