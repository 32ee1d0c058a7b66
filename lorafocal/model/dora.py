"""DoRA as PEFT computes it, but with its norms in the adapter's dtype, so that it starts at exactly the base.

DoRA multiplies each row of W + BA by magnitude / norm, and starts with B = 0 and the magnitude at the norm of W: a
factor of 1. PEFT takes that first norm before the adapter is widened, in the base's dtype (or that of its quantised
weight), and later ones in the dtype of the layer's input: the factor is then 1 only up to bf16's rounding, 0.4 %.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


class WideDora(DoraLinearLayer):
    """Made from PEFT's layer by exchanging its class, so names and saved files stay."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """PEFT takes the norm in the dtype of `x`."""
        result: Tensor = super().forward(x.to(self.weight.dtype), **options)
        return result


def widen_norms(model: nn.Module) -> None:
    """Norms in the dtype of the magnitudes, here and in adapters that are added to these layers later."""
    for module in model.modules():
        if type(module) is DoraLinearLayer:
            module.__class__ = WideDora


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """The magnitudes of a DoRA adapter to the norms of W + BA as they are now: once A and B have their start."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, dora in layer.lora_magnitude_vector.items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight = dequantize_module_weight(layer.get_base_layer()).to(b.dtype)
            dora.weight.data = dora.get_weight_norm(weight, b @ a, layer.scaling[name]).to(b.dtype)
