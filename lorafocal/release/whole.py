"""The merge of a model in memory: for checkpoints whose tensors are not those of their model, name by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from lorafocal.model.quantized import dequantized_weight, word_of
from lorafocal.release.deltas import Change
from lorafocal.release.dequantize import float_layer
from lorafocal.release.rounding import rounded_change
from lorafocal.release.survival import LayerSurvival


@torch.no_grad()
def fold(model: PreTrainedModel, learned: Mapping[str, Change], dtype: torch.dtype) -> tuple[LayerSurvival, ...]:
    """Put every change into its weight, in place: float32 arithmetic, one cast at the end.

    The weight of a quantised layer is the one it multiplies by, and the layer becomes a plain one. All other parameters
    stay as they are.
    """
    survival = []
    for name, change in learned.items():
        layer, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in layer._buffers:  # of a module that was trained in full
            getattr(layer, leaf).copy_(change.apply(getattr(layer, leaf)))
            continue
        quantized = leaf == "weight" and word_of(layer) is not None
        weight = dequantized_weight(layer) if quantized else getattr(layer, leaf).data
        stored, kept = rounded_change(name, weight.cpu(), change, dtype)
        survival.append(kept)
        stored = stored.to(weight.device)
        if quantized:
            model.set_submodule(name.rpartition(".")[0], float_layer(layer, stored))
        else:
            getattr(layer, leaf).data = stored
    return tuple(survival)
