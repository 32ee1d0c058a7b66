"""From weights in 4 or 8 bits back to floats: what an adapter that was trained on a quantised base is merged into.

Not the original weights: training saw the rounded ones, and its adapter corrects their errors too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafocal.model.quantized import dequantized_weight, word_of


def float_layer(layer: nn.Linear, weight: Tensor) -> nn.Module:
    """A plain linear layer of `weight` (out, in) in the place of a quantised `layer`, with its bias.

    A Conv1D where the quantised layer stands for one: transformers reads its file transposed.
    """
    features = (layer.in_features, layer.out_features)
    with torch.device("meta"):
        if getattr(layer, "source_cls", None) is Conv1D:
            plain: nn.Module = Conv1D(features[1], features[0])  # type: ignore[misc]
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(*features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return plain


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace what is still quantised in `model` by plain layers in `dtype`, and forget how it was loaded.

    transformers' own `dequantize` does not know that GPT-2's layers are transposed, and leaves a checkpoint that was
    quantised already unable to be saved. Nothing is done to a float model.
    """
    for name, layer in list(model.named_modules()):
        if word_of(layer) is not None:
            model.set_submodule(name, float_layer(layer, dequantized_weight(layer).to(dtype)))
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
        loaded_by: list[Any] = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [step for step in loaded_by if not _of_a_quantizer(step)]  # reversed at saving


def _of_a_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
