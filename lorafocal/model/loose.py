"""Adapters in the layers of a model that is no `PeftModel`: refused, and taken out again where we left them there.

PEFT changes layers in place, so a base holds its adapter by itself. Nothing else tells it from a plain model: it would
be trained in full, adapter and all, and saved as what nobody can load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorafocal.errors import InputError
from lorafocal.model.adapters import adapter_layers
from lorafocal.model.compiled import restore_layers
from lorafocal.model.fused import unfuse
from lorafocal.model.starts import rewrites_base
from lorafocal.model.trained_modules import plain_modules

Given = ParamSpec("Given")


def check_not_loose(model: nn.Module, argument: str) -> None:
    """Refuse a model that holds an adapter in its layers without being a `PeftModel`. Raises InputError."""
    if isinstance(model, PeftModel) or not (layers := adapter_layers(model)):
        return
    first = next(name for name, module in model.named_modules() if module is layers[0])
    configs = getattr(model, "peft_config", {})
    changed = [config.init_lora_weights for config in configs.values() if _changes_base(config)]
    if changed:
        base = f"load the base again: the start {changed[0]!r} has changed its weights"
    else:
        base = (
            "take it out, by `unload()` of the PeftModel that put it there (`trainer.model.unload()` after a training),"
            " or load the base again"
        )
    raise InputError(
        f"{argument} is {type(model).__name__}, no PeftModel, and yet holds an adapter in its layers (first: {first}):"
        " from `add_adapter`, from an adapter's folder that was loaded as a model, or from an earlier training on the"
        " same base. To go on with a saved adapter, give `PeftModel.from_pretrained(base, folder, is_trainable=True)`;"
        f" for the base without it, {base}"
    )


def gives_base_back(init: Callable[Given, None]) -> Callable[Given, None]:
    """A trainer's constructor whose failure leaves its `model` without the adapter of `peft_config`: one may retry."""
    names = signature(init)

    @wraps(init)
    def guarded(*args: Given.args, **kwargs: Given.kwargs) -> None:
        given = names.bind(*args, **kwargs).arguments
        with given_back(given.get("model"), given.get("peft_config")):
            init(*args, **kwargs)

    return guarded


@contextmanager
def given_back(base: object, config: object) -> Iterator[None]:
    """Where the body fails, the adapter of `config` that it put into the layers of `base` is taken out again.

    One that takes a part of the base's weights away (PiSSA, OLoRA) stays, so that nobody trains on what is left.
    """
    if not isinstance(base, nn.Module) or config is None or adapter_layers(base) or _changes_base(config):
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        take_out(base)
        for parameter, learned in trainable:
            parameter.requires_grad_(learned)
        raise


def take_out(base: Any) -> None:
    """Put the base's own layers back, without a `PeftModel` at hand (its `unload()` does as much)."""
    restore_layers(base)
    unfuse(base)
    while layers := {*adapter_layers(base)}:
        for name, layer in reversed([*base.named_modules(remove_duplicate=False)]):  # while what is around it stands
            if layer in layers and base.get_submodule(name.rpartition(".")[0]) not in layers:
                own = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else plain_modules(layer)[0]
                base.set_submodule(name, own)
    vars(base).pop("peft_config", None)


def _changes_base(config: object) -> bool:
    return rewrites_base(getattr(config, "init_lora_weights", None))
