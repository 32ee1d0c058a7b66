"""The twin of a training step: PEFT's own forward, one sequence at a time, transformers' attention, plain formulas.

Nothing of the library computes here but the de-quantised weights of a layer (`wrap` is PEFT's `get_peft_model`). In
float64 it is what a step should be; in the base's own dtype it says how far rounding alone takes a right implementation
from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafocal.data.tokens import TokenizedPair
from lorafocal.model.adapters import wrap
from lorafocal.model.quantized import dequantized_weight

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What one step computes: its loss, and the gradient of each adapter tensor by full parameter name."""

    loss: float
    gradients: dict[str, Tensor]


def as_float(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The float model that `base` stands for, in `dtype`: quantised layers by the weights that they multiply by."""
    values = {name: value for name, value in base.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(base.config)(**values), dtype=dtype).to(base.device)
    state = {name: tensor for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            state[f"{name}.weight"] = dequantized_weight(layer)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.requires_grad_(False)


def step_of(
    base: PreTrainedModel,
    config: LoraConfig,
    pairs: Sequence[TokenizedPair],
    *,
    start: Tensors | None,
    now: Tensors,
    beta: float = 0.1,
    gamma: float = 0.05,
) -> Step:
    """FocalPO's step for an adapter `now` on `base`; the reference is the adapter `start`, or none at all (None)."""
    model = wrap(base, config)
    with torch.no_grad():
        _set(model, now if start is None else start)
        with model.disable_adapter() if start is None else nullcontext():
            reference = _margins(model, pairs)
    _set(model, now)
    probability = torch.sigmoid(beta * (_margins(model, pairs) - reference))
    loss = (-(probability**gamma) * probability.log()).mean()
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if name in now}
    model.unload()
    return Step(loss.item(), gradients)


def _set(model: PeftModel, tensors: Tensors) -> None:
    """Give the adapter its values, in the model's dtype but at least in fp32."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data = tensor.to(model.device, dtype)
        parameters[name].requires_grad_(True)


def _margins(model: PeftModel, pairs: Sequence[TokenizedPair]) -> Tensor:
    """Log-prob of the chosen completion less that of the rejected one, in nats."""
    return torch.stack(
        [_logp(model, p.prompt_ids, p.chosen_ids) - _logp(model, p.prompt_ids, p.rejected_ids) for p in pairs]
    )


def _logp(model: PeftModel, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return wide.gather(-1, ids[0, len(prompt) :, None]).sum()
