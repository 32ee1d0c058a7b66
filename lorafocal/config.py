"""The typed description of a run: YAML plus dotted overrides into a closed, frozen schema.

Every mistake is reported at once, with its dotted key, what was found and what is allowed. Imports neither
torch nor transformers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from lorafocal.bounds import check_beta, check_dropout, check_gamma
from lorafocal.errors import InputError
from lorafocal.training_fields import RULES, check_training_fields, installed_fields
from lorafocal.yaml12 import dump_yaml, parse_yaml


def _no_half_precision(value: Any) -> Any:
    if value in ("float16", "fp16", "half"):
        raise ValueError(f"found {value!r}; {RULES['fp16'].reason}")
    return value


def _target_modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise ValueError(f"found {value!r}; allowed: all-linear, or a list of module names such as [q_proj, v_proj]")


def _architecture(value: Any) -> Any:
    if value is not None and not (isinstance(value, dict) and isinstance(value.get("model_type"), str)):
        raise ValueError(f"found {value!r}; allowed: the model's transformers config values, model_type among them")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Model(_Section):
    """Which base model, and in which precision it computes."""

    name: Annotated[str, Field(min_length=1)]
    revision: Annotated[str | None, Field(pattern=r"^[0-9a-f]{40}$")] = None
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(_no_half_precision)]
    shape: Annotated[dict[str, Any] | None, BeforeValidator(_architecture)] = None


class Adapter(_Section):
    """The LoRA adapters that are trained."""

    r: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    targets: Annotated[Any, BeforeValidator(_target_modules)] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    allow_dropout: bool = False

    @model_validator(mode="after")
    def _dropout_is_deliberate(self) -> Adapter:
        check_dropout(self.dropout, allowed=self.allow_dropout)
        return self


class Data(_Section):
    """Preference files (.jsonl, .json or .parquet) and how long a sequence may be."""

    train: Annotated[str, Field(min_length=1)]
    eval: Annotated[str | None, Field(min_length=1)] = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    truncation: Literal["drop"] = "drop"


class Objective(_Section):
    """The loss and its parameters; gamma (0.05 if absent) belongs to focalpo only."""

    name: Literal["focalpo", "dpo"]
    beta: float
    gamma: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _paper_gamma(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("name") == "focalpo":
            return {"gamma": 0.05, **section}
        return section

    @model_validator(mode="after")
    def _values_make_sense(self) -> Objective:
        check_beta(self.beta)
        if self.name == "focalpo":
            check_gamma(self.gamma)  # type: ignore[arg-type]  # an explicit null is refused there
        elif self.gamma is not None:
            raise ValueError(
                f"gamma is {self.gamma}, but dpo has no gamma and would ignore it; remove it, or set it null"
            )
        return self


class Reference(_Section):
    """What the policy is compared with; no default, because a wrong reference trains without complaint."""

    kind: Literal["disabled_adapter"]
    identity_probe: bool = True


class Training(BaseModel):
    """Our own keys, and beside them the supported fields of `TrainingArguments` under their own names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    pairs_per_step: Annotated[int, Field(ge=1)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 42
    data_seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode="wrap")
    @classmethod
    def _only_fields_we_honour(cls, section: Any, handler: Any) -> Any:
        problems: list[Any] = []
        result = None
        try:
            result = handler(section)
        except ValidationError as error:
            problems += error.errors()
        if isinstance(section, dict):
            problems += _training_problems({k: v for k, v in section.items() if k not in cls.model_fields}, section)
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, [_line_error(problem) for problem in problems])
        return result

    @property
    def fields(self) -> dict[str, Any]:
        """The `TrainingArguments` fields that were given, beside our own keys."""
        return dict(self.model_extra or {})


class Packing(_Section):
    """How pairs are laid out for the model: changes memory and speed, never the result."""

    layout: Literal["packed", "padded"] = "packed"
    tokens: Annotated[int, Field(ge=1)] = 2048


class Config(_Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    model: Model
    adapter: Adapter
    data: Data
    objective: Objective
    reference: Reference
    training: Training
    packing: Packing = Packing()

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Config:
        strategy = self.training.fields.get("eval_strategy", "no")
        if self.data.eval is None and (strategy != "no" or self.training.fields.get("eval_on_start")):
            raise ValueError(
                "training asks for evaluation, but data.eval names no file; give one, or remove eval_strategy"
            )
        return self

    def sha(self) -> str:
        """sha256 (hex) of the resolved values; equal for two files that describe the same run."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def warnings(self) -> list[str]:
        """What is legal here but deserves a word before the run starts."""
        risky = check_gamma(self.objective.gamma) if self.objective.gamma is not None else None
        return [f"objective.gamma: {risky}"] if risky else []


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides in order, and check everything.

    Raises `InputError` naming the file and listing all mistakes: unknown keys with the nearest known one,
    missing keys, wrong types (a number written as text is one), and values out of bounds.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the config {file}: {getattr(error, 'strerror', None) or error}") from error
    values = parse_yaml(text, source=str(file))
    if not isinstance(values, dict):
        raise InputError(f"{file}: found {type(values).__name__}; a config is a mapping of {_names(Config)}")
    for override in overrides:
        _apply(values, override)
    return check_config(values, source=str(file))


def check_config(values: Mapping[str, Any], source: str = "config") -> Config:
    """The checked `Config` of plain nested values, or one `InputError` that lists every mistake in them."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        lines = [line for details in error.errors() for line in _describe(details)]
        raise InputError("\n  ".join([f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}", *lines])) from None


def resolved_yaml(config: Config) -> str:
    """All values of a run, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    return dump_yaml(config.model_dump(mode="json"))


def known_keys() -> list[str]:
    """Every dotted key a config may have with the installed transformers, in the order of the schema."""
    keys: list[str] = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, BaseModel)
        keys += [f"{name}.{key}" for key in section.model_fields] if is_section else [name]  # type: ignore[union-attr]
    fields = [name for name in installed_fields() if name in RULES and f"training.{name}" not in keys]
    return keys + [
        f"training.{name}" for name in fields if RULES[name].kind == "supported" and not RULES[name].config_key
    ]


def training_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `FocalPOConfig` for a run, with our keys translated to the installed transformers.

    `output_dir` is the caller's: the run folder is not part of the config.
    """
    training, objective = config.training, config.objective
    arguments: dict[str, Any] = {
        "run_name": config.name,
        "objective": objective.name,
        "beta": objective.beta,
        "reference": config.reference.kind,
        "identity_probe": config.reference.identity_probe,
        "max_length": config.data.max_length,
        "truncation": config.data.truncation,
        "layout": config.packing.layout,
        "tokens_per_pack": config.packing.tokens,
        "allow_dropout": config.adapter.allow_dropout,
        "pairs_per_step": training.pairs_per_step,
        "seed": training.seed,
        "data_seed": training.data_seed,
        **training.fields,
    }
    if objective.gamma is not None:
        arguments["gamma"] = objective.gamma
    if training.warmup_ratio > 0:
        arguments["warmup_steps"] = (
            training.warmup_ratio
        )  # below 1 it is a share of all steps, in transformers 5.5 and later
    if training.activation_checkpointing:
        prefix = "activation" if "activation_checkpointing" in installed_fields() else "gradient"
        arguments[f"{prefix}_checkpointing"] = True
        arguments[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def lora_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig` for a run; `target_modules` may still be the word all-linear."""
    adapter = config.adapter
    return {
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "target_modules": adapter.targets,
        "lora_dropout": adapter.dropout,
        "task_type": "CAUSAL_LM",
    }


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in nested values; the value is read as YAML, so 1e-5 is a number."""
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise InputError(f"{override!r} is not an override; write section.key=value, for example objective.beta=0.1")
    place = values
    for depth, part in enumerate(path[:-1], start=1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError(f"{override!r}: {'.'.join(path[:depth])} is {place!r}, which has no keys inside")
    place[path[-1]] = parse_yaml(text, source=f"override {key.strip()}")


def _training_problems(fields: dict[str, Any], section: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """(key, message) of each field under `training` that is not ours to pass on."""
    passed = {}
    for name, value in fields.items():
        rule = RULES.get(name)
        if rule is not None and rule.config_key:
            yield name, f"found {value!r}; in a config this is said by the key {rule.config_key}"
        elif rule is None and name not in installed_fields():
            yield name, _unknown(f"training.{name}")
        else:
            passed[name] = value
    for message in check_training_fields(passed):
        name, _, text = message.partition(": ")
        yield name, text
    if "warmup_steps" in fields and "warmup_ratio" in section:
        yield "warmup_steps", "warmup_ratio is given too; remove one of the two"


def _line_error(problem: Any) -> InitErrorDetails:
    """One line of a pydantic error: either ours, a (key, message), or pydantic's own details passed on."""
    if isinstance(problem, tuple):
        key, message = problem
        return {
            "type": PydanticCustomError("training_field", "{message}", {"message": message}),
            "loc": (key,),
            "input": None,
        }
    kept = PydanticCustomError(problem["type"], "{message}", {"message": problem["msg"]})
    return {"type": kept, "loc": problem["loc"], "input": problem["input"]}


def _describe(details: ErrorDetails) -> Iterable[str]:
    """The line or lines a person reads for one pydantic error."""
    key = ".".join(str(part) for part in details["loc"]) or "config"
    message, found = details["msg"], details["input"]
    if details["type"] == "extra_forbidden":
        yield f"{key}: {_unknown(key)}"
    elif details["type"] == "missing":
        yield f"{key}: missing; it has no default"
    elif details["type"] == "training_field":
        yield f"{key}: {message}"
    elif details["type"] == "value_error":
        yield f"{key}: {message.removeprefix('Value error, ')}"
    elif details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        yield f"{key}: found {found!r}; it must be a mapping of keys"
    else:
        allowed = re.sub(r"^(Input|String) should ", "it must ", message)
        yield f"{key}: found {found!r} ({type(found).__name__}); {allowed}"


def _unknown(key: str) -> str:
    """What to say about an unknown key: the same name in another section, or the nearest spelling."""
    keys = known_keys()
    last = key.rpartition(".")[2]
    near = [known for known in keys if known.rpartition(".")[2] == last] or difflib.get_close_matches(key, keys, n=1)
    section = key.rpartition(".")[0]
    inside = [known for known in keys if known.rpartition(".")[0] == section]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(inside) or _names(Config)}"
    return f"unknown key; {hint}"


def _names(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)
