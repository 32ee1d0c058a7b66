"""From TRL: a `DPOConfig` to a `FocalPOConfig` that trains on the same pairs with the same settings."""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from lorafocal.arguments import FocalPOConfig
from lorafocal.compat.trl_fields import Given, trains_in_bf16, translate
from lorafocal.errors import InputError

if TYPE_CHECKING:
    from trl import DPOConfig

logger = logging.getLogger(__name__)

_BASE = {
    True: "bf16 is on: give the base in bfloat16, as a model given by name is loaded; adapters stay float32",
    False: "bf16 is off: load the base in float32 and pass the model; one given by name would be loaded in bfloat16",
}


def focalpo_config(dpo_config: DPOConfig, *, objective: str = "focalpo", gamma: float | None = None) -> FocalPOConfig:
    """The settings of a `trl.DPOConfig` for `FocalPOTrainer`, TRL's own defaults included.

    `objective="dpo"` trains TRL's loss; "focalpo" takes `gamma` beside its beta (0.05 if absent). pairs_per_step is
    per_device_train_batch_size * gradient_accumulation_steps * the world size of this launch, so call it in every
    process, as `DPOConfig` is. Every field is translated, without effect, or refused (`lorafocal.compat.trl_fields`).
    The dtype is the base's own affair here: what TRL's bf16 asks of it is logged.

    Raises InputError listing each field that cannot be honoured, with the way out.
    """
    if not isinstance(dpo_config, TrainingArguments) or not any(map(_is_trls, type(dpo_config).__mro__)):
        raise InputError(
            f"expected a trl.DPOConfig, found {type(dpo_config).__name__}: another trainer's loss has terms that would"
            " be lost; write a FocalPOConfig, whose `objective` knows many of them"
        )
    values = {spec.name: getattr(dpo_config, spec.name) for spec in fields(dpo_config)}
    neutral = vars(FocalPOConfig(output_dir=values["output_dir"], use_cpu=values["use_cpu"]))  # as TRL's: processed
    untouched = neutral | {"output_dir": None, "use_cpu": False}
    translation = translate(Given(values, dpo_config.world_size), untouched, defaults(type(dpo_config)))
    if translation.problems:
        raise InputError("\n  ".join(["DPOConfig cannot be translated:", *translation.problems]))
    logger.warning(_BASE[trains_in_bf16(values)])
    chosen = {"objective": objective} | ({} if gamma is None else {"gamma": gamma})
    return FocalPOConfig(**translation.arguments | chosen)


def _is_trls(config: type) -> bool:
    """Whether a class is TRL's `DPOConfig`, found without importing TRL."""
    return config.__name__ == "DPOConfig" and config.__module__.partition(".")[0] == "trl"


def defaults(config: type) -> dict[str, Any]:
    """What each field of a dataclass holds before anything is said."""
    return {
        spec.name: spec.default if spec.default_factory is MISSING else spec.default_factory()
        for spec in fields(config)
    }
