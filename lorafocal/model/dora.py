"""DoRA that starts at exactly the base, on every base: PEFT's layer, with its norms in the adapter's dtype.

DoRA multiplies each row of W + BA by magnitude / norm, and starts with B = 0 and the magnitude at the norm of W: a
factor of 1. PEFT takes that first norm before the adapter is widened, in the base's dtype, and later ones in the dtype
of the layer's input: the factor is then 1 only up to bf16's rounding, 0.4 %. On a CPU it also breaks 8-bit layers, by
de-quantising them in a way that loses their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn.functional import linear

from lorafocal.model.trained_modules import is_quantized


class WideDora(DoraLinearLayer):
    """Made from PEFT's layer by exchanging its class, so names and saved files stay."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What DoRA adds to the layer's output. `x` has had its dropout, and then `base_result` is None."""
        weight = _wide(base_layer, self.weight.dtype, transposed=self.fan_in_fan_out)
        factor = self.weight / row_norms(weight, lora_A.weight, lora_B.weight, scaling)
        if base_result is None:
            base_result = linear(x, weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        added = (factor - 1) * base_result + factor * lora_B(lora_A(x)) * scaling
        return added.to(base_result.dtype)  # an fp32 output would make the residual stream fp32


def _wide(layer: nn.Module, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """The weight (out, in) that a layer multiplies by; the layer is left as it is, 8-bit ones too."""
    weight: Any = layer.weight
    if is_quantized(weight):
        weight = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return (weight.T if transposed else weight).to(dtype)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of W + scaling B A, (out,); a constant in the backward (DoRA, section 4.3)."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.linalg.norm(weight + scaling * (b @ a), dim=1)


def exact_dora(model: nn.Module) -> None:
    """Exchange PEFT's DoRA layers for ours, and mend the 8-bit ones: after every adapter that is added."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.lora_magnitude_vector:
            for dora in module.lora_magnitude_vector.values():
                dora.__class__ = WideDora
            _mend_scales(module.get_base_layer())


def _mend_scales(layer: Any) -> None:
    """PEFT de-quantises a weight that it then replaces by one without scales, which the next forward would take."""
    if type(layer.weight).__name__ == "Int8Params" and layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.CB = None


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """The magnitudes of a DoRA adapter to the norms of W + BA as they are now: once A and B have their start."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, dora in layer.lora_magnitude_vector.items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight = _wide(layer.get_base_layer(), b.dtype, transposed=dora.fan_in_fan_out)
            dora.weight.data = row_norms(weight, a, b, layer.scaling[name])
