"""A base without its weights: which tensors it has, which are tied, transposed or quantised, and how each was loaded.

So a checkpoint can be gone through tensor by tensor, and each one be what `load_base` would have made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from lorafocal.model.load import DTYPES, door, local_device
from lorafocal.model.quantized import bitsandbytes_config, dequantized_weight, prequantized, settle
from lorafocal.model.saved import read_config
from lorafocal.model.trained_modules import is_tied
from lorafocal.release.shards import Checkpoint


@dataclass(frozen=True)
class Skeleton:
    """`model` is on the meta device, its parameters in the dtypes that loading gives them.

    `places`: each stored name of a parameter or persistent buffer to the one that stands for all that it is tied to.
    `transposed`: the weights that a checkpoint holds as (in, out). `quantized`: those that are rounded to few bits on
    loading, by `operation`, transformers' own. `stored`: what the checkpoint itself is quantised as.
    """

    model: PreTrainedModel
    places: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    parameters: frozenset[str]
    transposed: frozenset[str]
    tied: bool
    stored: str | None
    operation: Any = None
    quantized: frozenset[str] = field(default_factory=frozenset)

    def obstacle(self, checkpoint: Checkpoint) -> str | None:
        """Why the checkpoint cannot be gone through tensor by tensor; None where each of its tensors is one of the
        model's."""
        if self.stored is not None:
            return f"its weights are stored as {self.stored}"
        found = {self.places[name] for name in checkpoint.tensors if name in self.places}
        if missing := sorted(set(self.places.values()) - found):
            return f"it has no tensor {missing[0]}"
        wide = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        for name, tensor in checkpoint.tensors.items():
            if name in self.shapes and tensor.shape != self.shapes[name]:
                return f"its {name} has another shape in the model"
            if name in self.shapes and tensor.dtype != self.dtypes[name] and any(part in name for part in wide):
                return f"transformers keeps {name} in float32"
        return self._rebuilt(checkpoint.tensors)

    def _rebuilt(self, names: Iterable[str]) -> str | None:
        """A tensor that transformers computes from what is stored, under the same name (rotated, transposed)."""
        steps = [step for step in get_model_conversion_mapping(self.model) if getattr(step, "operations", None)]
        patterns = [pattern for step in steps for pattern in step.source_patterns]
        for name in names:
            if name in self.places and any(re.search(pattern, name) for pattern in patterns):
                return f"transformers rebuilds {name} on loading"
        return None

    @torch.no_grad()
    def as_loaded(self, name: str, stored: Tensor) -> Tensor:
        """The tensor that training computed with: rounded to its dtype, and to few bits and back (then float32).

        It keeps the shape that it is stored in.
        """
        dtype = self.dtypes[name]
        exact = torch.promote_types(stored.dtype, dtype) == dtype  # a wider dtype would only cost memory
        rounded = stored if exact and name not in self.quantized else stored.to(dtype)
        if name not in self.quantized:
            return rounded
        weight = self._quantized_and_back(name, rounded)
        return weight.T if name in self.transposed else weight

    def _quantized_and_back(self, name: str, weight: Tensor) -> Tensor:
        """(out, in) on the CPU, in float32; quantised where and as loading does it."""
        layer: Any = self.model.get_submodule(name.rpartition(".")[0])
        empty = layer.weight
        values = {name: [weight.to(local_device())]}
        layer.weight = self.operation.convert(values, full_layer_name=name, model=self.model)[name]
        settle(self.model)
        floats = dequantized_weight(layer).cpu()
        layer.weight = empty
        return floats


def skeleton(name: str, revision: str | None, *, dtype: str, quantization: str | None) -> Skeleton:
    """The model of a hub id or folder as `load_base` would load it, without reading a weight."""
    config = read_config(name, revision)
    stored = prequantized(config, name)
    with torch.device("meta"):
        model = door(config, name).from_config(config, dtype=DTYPES[dtype])
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    places = {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}
    layers = {key: module for key, module in model.named_modules() if isinstance(module, Conv1D)}
    operation, quantized = None, frozenset[str]()
    if quantization is not None and stored is None:
        operation, quantized = _prepare(model, quantization, dtype)
    return Skeleton(
        model=model,
        places=places,
        shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
        dtypes={key: tensor.dtype for key, tensor in state.items()},
        parameters=frozenset(key for key, tensor in state.items() if isinstance(tensor, nn.Parameter)),
        transposed=frozenset(f"{key}.weight" for key in layers),
        tied=is_tied(model),
        stored=stored,
        operation=operation,
        quantized=quantized,
    )


def _prepare(model: PreTrainedModel, quantization: str, dtype: str) -> tuple[Any, frozenset[str]]:
    """Put bitsandbytes' empty layers where loading puts them; what fills one, and the names of their weights."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(quantization, DTYPES[dtype]), pre_quantized=False)
    before = {name: type(module) for name, module in model.named_modules()}
    quantizer.preprocess_model(model=model, dtype=DTYPES[dtype], device_map={"": local_device()})
    replaced = [name for name, module in model.named_modules() if type(module) is not before.get(name)]
    return quantizer.get_quantize_ops(), frozenset(f"{name}.weight" for name in replaced)
