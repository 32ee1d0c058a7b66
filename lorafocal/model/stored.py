"""Whether a base in memory is the model that its name stands for: what is trained on it is opened on that one again.

An adapter's file names its base and cannot hold it. A base that was changed after loading (another adapter merged into
it, PiSSA's part taken out) or quantised in a way of its own would be remembered as one that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorafocal.errors import InputError
from lorafocal.model.adapters import linear_names
from lorafocal.model.continued import place_of
from lorafocal.model.head import causal_lm
from lorafocal.model.load import weight_files
from lorafocal.model.quantized import quantization_of, word_of
from lorafocal.model.trained_modules import is_quantized

_OF_ADAPTERS = {"base_layer", "original_module"}  # what PEFT puts into the names of the base's own tensors
_ADDED = {"lora_A", "lora_B", "modules_to_save", "token_adapter"}
_LOADED_AS = (torch.bfloat16, torch.float16)  # a model may have been widened after it was loaded in one of these
_REMEDY = "save it as it is (`save_pretrained`) and load that folder with `lorafocal.load_base`"


@torch.no_grad()
def check_as_stored(model: nn.Module) -> None:
    """Refuse a base that its name would not bring back; one that comes from nowhere has none.

    Of each float tensor the first and last rows are held against the file. Tensors that a file has under other names,
    and quantised ones, are passed over. Raises InputError.
    """
    base: Any = causal_lm(model)
    name, revision = place_of(base)
    if name is None:
        return
    _check_quantized_whole(base, name)
    held = _own_tensors(base)
    for file in weight_files(name, revision):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():
                if key in held and not _equal(held[key], stored.get_slice(key)):
                    raise InputError(
                        f"the base was loaded from {name}, but {key} is not what is stored there: it was changed since"
                        f" (an adapter merged into it?), and the adapter would be saved as one for {name}. To train on"
                        f" the changed base, {_REMEDY}"
                    )


def _own_tensors(base: nn.Module) -> Mapping[str, Tensor]:
    """The base's own float tensors by the names that they have without an adapter."""
    held = {}
    for full, tensor in base.named_parameters():
        parts = full.split(".")
        if not is_quantized(tensor) and _ADDED.isdisjoint(parts):
            held[".".join(part for part in parts if part not in _OF_ADAPTERS)] = tensor
    return held


def _equal(held: Tensor, stored: Any) -> bool:
    """Whether the first and last rows of a tensor are those of a file's slice, in the dtype that it was loaded in."""
    shape = stored.get_shape()
    if list(held.shape) != shape:
        return False
    ends = (slice(None),) if len(shape) < 2 else (slice(0, 1), slice(shape[0] - 1, shape[0]))
    for rows in ends:
        ours, theirs = held[rows].cpu(), stored[rows]
        if not any(torch.equal(ours, theirs.to(dtype).to(ours.dtype)) for dtype in (ours.dtype, *_LOADED_AS)):
            return False
    return True


def _check_quantized_whole(base: Any, name: str) -> None:
    """Refuse layers that were left in float when loading quantised the rest: `load_base` leaves none."""
    word, quantizer = quantization_of(base), getattr(base, "hf_quantizer", None)
    if word is None or quantizer is None or quantizer.pre_quantized:
        return
    layers = dict(base.named_modules())
    for layer in linear_names(base):
        if word_of(layers[layer]) is None and _ADDED.isdisjoint(layer.split(".")):
            raise InputError(
                f"the base was quantised to {word} on loading from {name}, but {layer} was left in float"
                " (`llm_int8_skip_modules`?), which the saved adapter could not tell: load it by"
                f" `lorafocal.load_base(name, quantization={word!r})`, or {_REMEDY}"
            )
