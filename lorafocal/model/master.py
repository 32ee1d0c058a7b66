"""Models of which every weight is trained: which weights those are, and fp32 masters under bf16 arithmetic.

A bf16 weight of 0.02 is moved by steps of 6e-5 or not at all, and AdamW's are some 1e-6. So where the engine keeps no
masters of its own, the trained weights are widened in place, and computed with under bf16 autocast: embeddings hand on
bf16 rows, so that a widened model computes what it did in bf16, up to the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.model.quantized import base_dtype

_ARITHMETIC = "_lorafocal_arithmetic"  # of a widened base: the dtype that it still computes in
_UNLEARNED = ("e_score_correction_bias",)  # of routers: balanced by counting, never by a gradient
_SCALE = "embed_scale"  # what embeddings are multiplied by, as transformers names it


def arithmetic_of(model: nn.Module) -> torch.dtype:
    """What a model computes in: bfloat16 under autocast for one with fp32 masters, else the dtype of its base."""
    return getattr(causal_lm(model), _ARITHMETIC, None) or base_dtype(model)


def has_masters(model: nn.Module) -> bool:
    """Whether a full-parameter run has widened the model."""
    return hasattr(causal_lm(model), _ARITHMETIC)


def train_in_full(model: nn.Module) -> dict[str, Parameter]:
    """Let every floating parameter of the text part be trained; those by name, tied ones once.

    Other parts, such as an image encoder, see no pair and stay frozen. Raises InputError where nothing is left.
    """
    base: Any = causal_lm(model)
    text = {id(p) for part in (base.get_decoder(), base.get_output_embeddings()) for p in part.parameters()}
    trained = {}
    for name, parameter in model.named_parameters():
        learned = id(parameter) in text and parameter.is_floating_point() and not name.endswith(_UNLEARNED)
        parameter.requires_grad_(learned)
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        raise InputError(f"{type(base).__name__} has no floating parameters to train")
    return trained


def hold_masters(model: nn.Module, trained: Mapping[str, Parameter]) -> None:
    """Widen the trained weights of a bf16 model to fp32, in place; those that are wide already stay, as adapters are.

    A second call changes nothing.
    """
    if needs_masters(model, trained):
        _hold(model)


def needs_masters(model: nn.Module, trained: Mapping[str, Parameter]) -> bool:
    """Whether weights are trained that are held in bf16."""
    return base_dtype(model) == torch.bfloat16 and any(p.dtype == torch.bfloat16 for p in trained.values())


def check_one_width(model: nn.Module, engine: str) -> None:
    """Refuse a bf16 model with weights that it keeps in fp32, as some routers are: `engine` would round them all alike.

    Only where its bf16 weights are trained. Raises InputError.
    """
    if not needs_masters(model, {name: p for name, p in model.named_parameters() if p.requires_grad}):
        return
    if wide := [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]:
        raise InputError(
            f"{engine} computes with every weight in bfloat16, and {type(causal_lm(model)).__name__} keeps {len(wide)}"
            f" of its own in float32 ({wide[0]} is one), which would be rounded: train it by `engine.kind: ddp`, or set"
            " `model.dtype: float32`"
        )


def hold_alike(model: nn.Module, policy: nn.Module) -> nn.Module:
    """A reference that computes exactly as a `policy` with masters does, if it has them."""
    if has_masters(policy) and base_dtype(model) == torch.bfloat16:
        _hold(model)
    return model


def widen(module: nn.Module) -> None:
    """Parameters in bf16 to fp32, in place: of a part of a model, where the engine takes one part after the other."""
    for parameter in module.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def _hold(model: nn.Module) -> None:
    base = causal_lm(model)
    widen(model)
    for module in base.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_in_bfloat16)
            if isinstance(scale := getattr(module, _SCALE, None), Tensor):
                scale.copy_(scale.bfloat16())  # Gemma rounds it to the dtype of the weights
    setattr(base, _ARITHMETIC, torch.bfloat16)


def _in_bfloat16(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
    return rows.to(torch.bfloat16)
