"""What a model draws at random while it trains, switched off: policy and reference are to differ by nothing else."""

from __future__ import annotations

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lorafocal.model.head import causal_lm


def switch_noise_off(model: nn.Module) -> int:
    """Make training compute what evaluation does; how many places drew at random before.

    Every dropout of model and adapter becomes 0, in modules, attributes and configs, and routers of experts draw no
    jitter (Mixtral's and PhiMoE's do while they train).
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            module.p, changed = 0.0, changed + 1
        if isinstance(module, LoraLayer):
            # at 0, too, DoRA with a dropout multiplies by the base a second time in training, and rounds otherwise
            module.lora_dropout.update({name: nn.Identity() for name in module.lora_dropout})
        changed += _zero_dropouts(module) + _still_jitter(module)
    configs = [causal_lm(model).config, *getattr(model, "peft_config", {}).values()]
    return changed + sum(_zero_dropouts(config) for config in configs)


def _still_jitter(module: nn.Module) -> bool:
    """Not by a jitter of 0: PhiMoE's router compares scores with it in evaluation, too, and samples whatever it is."""
    jitters = any("jitter" in name and value for name, value in vars(module).items())
    if not jitters or _evaluate in module._forward_pre_hooks.values():
        return False
    module.register_forward_pre_hook(_evaluate)
    return True


def _evaluate(module: nn.Module, _: object) -> None:
    module.training = False  # of itself alone; `train()` sets it again


def _zero_dropouts(owner: object) -> int:
    """Zero the plain float attributes whose names end in dropout, dropout_p, dropout_prob or pdrop."""
    named = [
        name
        for name, value in vars(owner).items()
        if name.endswith(("dropout", "dropout_p", "dropout_prob", "pdrop")) and isinstance(value, float) and value
    ]
    for name in named:
        setattr(owner, name, 0.0)
    return len(named)
