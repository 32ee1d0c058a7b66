"""LoftQ starts (arXiv:2310.08659): an adapter that makes good, as far as its rank allows, what rounding to 4 bits lost.

The quantised base stays as it is, so W is nearest to Q + s B A with the truncated SVD of W - Q. PEFT's function of this
name leaves the scaling s out and needs CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.model.load import weight_files
from lorafocal.model.quantized import dequantized_weight, word_of
from lorafocal.tensor_files import PEFT_PREFIX

_FAR = 0.5  # relative error; 4 bits lose 0.1, weights of another model 1.4
_REMEDY = (
    "load the float original and quantise it on loading (`model.quantization: nf4`), or use `adapter.init: default`"
)


@torch.no_grad()
def loftq_start(policy: PeftModel) -> None:
    """Start A and B of every 4-bit layer from its float weights, found where the base was loaded from, in fp32.

    The other layers keep their start. Raises InputError where no layer is in 4 bits, or float weights are missing.
    """
    name = policy.active_adapter
    layers = {
        path.removeprefix(PEFT_PREFIX): layer
        for path, layer in policy.named_modules()
        if isinstance(layer, LoraLayer) and word_of(layer.get_base_layer()) not in (None, "int8")
    }
    if not layers:
        raise InputError(f"adapter.init: loftq makes good what 4 bits lost, and no layer is held in 4 bits: {_REMEDY}")
    originals = FloatWeights(policy)
    for path, layer in layers.items():
        held = dequantized_weight(layer)
        lost = originals.weight(path, held) - held
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank, root = layer.r[name], (s / layer.scaling[name]).sqrt()
        layer.lora_A[name].weight.data = (root[:rank, None] * vh[:rank]).contiguous()
        layer.lora_B[name].weight.data = (u[:, :rank] * root[:rank]).contiguous()


class FloatWeights:
    """The float weights that a base was quantised from, read one at a time from its safetensors files."""

    def __init__(self, policy: PeftModel) -> None:
        """Raises InputError where the base comes from nowhere, or its files are gone."""
        base: Any = causal_lm(policy)
        self._base, self._place = base, str(base.config._name_or_path or "")
        if not self._place:
            raise InputError(
                f"adapter.init: loftq needs the base's float weights, and it was loaded from nowhere: {_REMEDY}"
            )
        self._files: Mapping[str, Path] = {}
        revision = getattr(base.config, "_commit_hash", None)
        for file in weight_files(self._place, revision):
            with safe_open(file, framework="pt") as stored:
                self._files = {**self._files, **dict.fromkeys(stored.keys(), file)}

    def weight(self, path: str, held: Tensor) -> Tensor:
        """The float32 weight of the layer `path`, (out, in), on the device of `held`, its 4-bit values.

        Raises InputError where it is missing, itself quantised, or far from `held`.
        """
        prefix = f"{self._base.base_model_prefix}."
        names = [f"{name}.weight" for name in (path, path.removeprefix(prefix))]
        name = next((name for name in names if name in self._files), None)
        if name is None:
            raise InputError(f"adapter.init: loftq finds no weight {names[0]!r} in {self._place}: {_REMEDY}")
        with safe_open(self._files[name], framework="pt") as stored:
            weight = stored.get_tensor(name)
        if not weight.is_floating_point() or weight.shape != held.shape:
            raise InputError(
                f"adapter.init: loftq needs the float weights of the base, and {self._place} holds {name!r} as"
                f" {weight.dtype} of shape {tuple(weight.shape)}: {_REMEDY}"
            )
        weight = weight.to(held.device, torch.float32)
        if (weight - held).norm() > _FAR * weight.norm():
            raise InputError(
                f"adapter.init: {name!r} in {self._place} is not what the base was quantised from: {_REMEDY}"
            )
        return weight
