"""The section `training`: our own keys, and the fields of the installed transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafocal.schema.mistakes import all_at_once
from lorafocal.training_fields import NO_WARMUP, RULES, check_training_fields, installed_fields
from lorafocal.values import Tier


class Training(BaseModel):
    """Our own keys, and beside them the supported fields of `TrainingArguments` under their own names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    pairs_per_step: Annotated[int, Field(ge=1)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation_checkpointing: Tier = "auto"
    loraplus_lr_ratio: Annotated[float | None, Field(ge=1)] = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @model_validator(mode="wrap")
    @classmethod
    def _only_fields_we_honour(cls, section: Any, handler: Any) -> Any:
        own = isinstance(section, dict)
        strange = {key: value for key, value in section.items() if key not in cls.model_fields} if own else {}
        return all_at_once(cls, section, handler, _training_problems(strange, section) if own else ())

    @property
    def fields(self) -> dict[str, Any]:
        """The `TrainingArguments` fields that were given, beside our own keys."""
        return dict(self.model_extra or {})


def _training_problems(fields: dict[str, Any], section: dict[str, Any]) -> Iterable[Any]:
    """What is wrong with the fields under `training`, as `line_error` takes it."""
    passed = {}
    for name, value in fields.items():
        rule = RULES.get(name)
        if rule is not None and rule.config_key:
            yield name, f"found {value!r}; in a config this is said by the key {rule.config_key}"
        elif rule is None and name not in installed_fields():
            yield {"type": "extra_forbidden", "loc": (name,), "msg": "unknown key", "input": value}
        else:
            passed[name] = value
    for message in check_training_fields(passed):
        name, _, text = message.partition(": ")
        yield name, text
    if section.get("warmup_ratio") and fields.get("lr_scheduler_type") == "constant":
        yield "warmup_ratio", NO_WARMUP
    if "warmup_steps" in fields and "warmup_ratio" in section:
        yield "warmup_steps", "warmup_ratio is given too; remove one of the two"
