"""Adapters that start from weights or data: PiSSA, OLoRA, LoftQ, EVA; and what is saved of them.

PiSSA and OLoRA are made by PEFT while it attaches: the base becomes W - s B0 A0, in its own dtype. LoftQ and EVA are
made here, after attaching. Only with EVA (B = 0) is the base with the adapter off the starting policy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.adapters import ALL_LINEAR, resolve_targets
from lorafocal.model.continued import mark_fresh
from lorafocal.model.dora import reset_magnitudes
from lorafocal.model.eva import IGNORED, eva_start, width_needed
from lorafocal.model.loftq import loftq_start

_START = "_lorafocal_start"  # an attribute of the policy: A0 and B0 by full parameter name, on the CPU


def rewrites_base(init: object) -> bool:
    """Whether a start takes a part of the base's weights away (PiSSA, OLoRA)."""
    return isinstance(init, str) and (init.startswith("pissa") or init.lower() == "olora")


def lora_config(**settings: Any) -> LoraConfig:
    """`peft.LoraConfig`, also for "loftq", whose constructor wants scipy and settings of a function unused here."""
    init = settings["init_lora_weights"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(default EVA config|post-training conversion)")
        config = LoraConfig(**(settings | {"init_lora_weights": True if init == "loftq" else init}))
    config.init_lora_weights = init
    return config


@contextmanager
def attaching(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Around `attach_lora`: first refuses what the start cannot do on this model's layers, then attaches.

    PEFT's own LoftQ at attaching replaces the quantised weights and needs CUDA: it is attached as plain LoRA.
    Raises InputError, with the model as it was.
    """
    init = config.init_lora_weights
    if isinstance(init, str):
        _check_settings(config, init)
        _check_layers(model, config, init)
    if init == "loftq":
        config.init_lora_weights = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")  # EVA's: no argument of ours
            yield
    finally:
        config.init_lora_weights = init


def initialize(policy: PeftModel, pairs: Sequence[TokenizedPair], *, seed: int) -> None:
    """Give the policy's fresh adapter its start: LoftQ from the base's float weights, EVA from `pairs`.

    Nothing to do for plain starts; of PiSSA and OLoRA, A0 and B0 are kept for `plain_adapter`. EVA changes ranks and
    replaces parameters. The same weights, pairs and seed give the same adapter, in fp32. Raises InputError.
    """
    mark_fresh(policy)
    init = policy.peft_config[policy.active_adapter].init_lora_weights
    if rewrites_base(init):
        setattr(policy, _START, {n: p.detach().cpu().clone() for n, p in _factors(policy).items()})
    elif init == "loftq":
        loftq_start(policy)
        reset_magnitudes(policy)
    elif init == "eva":
        eva_start(policy, pairs, seed=seed)


def plain_adapter(
    policy: PeftModel, values: Mapping[str, Tensor] | None = None
) -> tuple[LoraConfig, Mapping[str, Tensor]]:
    """The configuration that the policy's adapter is saved under, and the state dict to save it from.

    `values` take the place of the policy's own parameters of the same names.

    A PiSSA or OLoRA adapter becomes plain LoRA of twice the rank on the base as it was, W + s (B A - B0 A0): rows A
    and A0, columns B and -B0. alpha grows so that the scaling s stays. Exact up to the rounding of the base.
    """
    config = policy.peft_config[policy.active_adapter]
    plain = {"init_lora_weights": True, "loftq_config": {}, "eva_config": None}  # the tensors are all there
    start: Mapping[str, Tensor] | None = getattr(policy, _START, None)
    state = {**policy.state_dict(), **(values or {})}
    if start is None:
        return replace(config, **plain), state
    factor = math.sqrt(2) if config.use_rslora else 2  # scaling is alpha / sqrt(r) or alpha / r
    doubled = replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: alpha * factor for name, alpha in config.alpha_pattern.items()},
        **plain,
    )
    for name, first in start.items():
        now = state[name].detach().cpu()
        state[name] = torch.cat((now, first)) if ".lora_A." in name else torch.cat((now, -first), dim=1)
    return doubled, state


def _check_settings(config: LoraConfig, init: str) -> None:
    """Refuse settings of PEFT's own LoftQ and EVA that would be passed over here."""
    asked: Any = config.loftq_config or {}
    asked = asked if isinstance(asked, Mapping) else vars(asked)
    if init == "loftq" and (asked.get("loftq_bits", 4), asked.get("loftq_iter", 1)) != (4, 1):
        raise InputError(
            f"adapter.init: loftq starts in one step from a base that is held in 4 bits already, so loftq_config"
            f" {asked} would be ignored: use LoftQConfig(loftq_bits=4, loftq_iter=1)"
        )
    if init == "eva" and config.eva_config.label_mask_value != IGNORED:
        raise InputError(
            f"adapter.init: eva's label_mask_value is {config.eva_config.label_mask_value}, but the batches are made"
            f" here and mark prompts by {IGNORED}: leave it out"
        )


def _check_layers(model: nn.Module, config: LoraConfig, init: str) -> None:
    """Raises InputError where PEFT would fail at a layer, or start it wrongly without a word."""
    targets = ALL_LINEAR if config.target_modules is None else config.target_modules
    endings = tuple(f".{target}" for target in resolve_targets(model, targets))
    for name, layer in model.named_modules():
        if f".{name}".endswith(endings):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            if misfit := _misfit(name, layer, init, rank, config):
                raise InputError(f"adapter.init: {misfit}")


def _misfit(name: str, layer: Any, init: str, rank: int, config: LoraConfig) -> str | None:
    """What keeps a linear layer from this start at this rank, with the way out."""
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    if init == "eva":
        width = width_needed(rank, config)
        if width <= inputs:
            return None
        return (
            f"eva looks at {width} directions for rank {rank}, and {name} has {inputs} inputs: lower `adapter.r`, or"
            " use `init: default`"
        )
    if init.lower() == "olora" and isinstance(layer, Conv1D):
        return (
            f"{name} keeps its weights transposed (Conv1D, as GPT-2 has it), which PEFT's {init} does not know, so"
            " training would not start from the base: use `init: pissa`"
        )
    if (rewrites_base(init) or init == "loftq") and rank > min(inputs, outputs):
        return (
            f"{init} has no {rank} directions to take from {name} ({outputs} x {inputs}): lower `adapter.r`, or set"
            f" `adapter.rank_pattern: {{{name}: {min(inputs, outputs)}}}`"
        )
    return None


def _factors(policy: PeftModel) -> dict[str, nn.Parameter]:
    """A and B of every layer of the active adapter, by full parameter name."""
    endings = tuple(f".{kind}.{policy.active_adapter}.weight" for kind in ("lora_A", "lora_B"))
    return {name: parameter for name, parameter in policy.named_parameters() if name.endswith(endings)}
