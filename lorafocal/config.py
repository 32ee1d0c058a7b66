"""YAML plus dotted overrides to the checked description of a run, and that description to the libraries' arguments.

Every mistake is reported at once, with its dotted key, what was found and what is allowed. Imports neither
torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lorafocal.errors import InputError
from lorafocal.objectives import python_name, unknown
from lorafocal.references.strategy import KEYS
from lorafocal.schema import WORDED, Adapter, Config, Reference, Source
from lorafocal.schema.steps import keeps_order
from lorafocal.training_fields import RULES, installed_fields
from lorafocal.yaml12 import dump_yaml, parse_yaml

# What a section that is missing usually looks like.
USUAL = {
    "name": "my-run",
    "model": "{name: owner/model, dtype: bfloat16}",
    "adapter": "{r: 16, alpha: 32}",
    "data": "{train: pairs.jsonl, held_out: 0.05}",
    "objective": "{name: focalpo, beta: 0.1}",
    "reference": "{kind: disabled_adapter}",
    "training": "{pairs_per_step: 64, learning_rate: 5.0e-6}",
    "engine": "{kind: zero3}",
    "evaluation": "{every: 100, rule: number}",
}

# What the keys of PEFT, TRL and bitsandbytes are called here, where no spelling leads there.
ELSEWHERE = {
    "load_in_4bit": "model.quantization: nf4",
    "bnb_4bit_quant_type": "model.quantization: nf4 (or fp4)",
    "bnb_4bit_use_double_quant": "model.quantization: nf4-double",
    "use_bnb_nested_quant": "model.quantization: nf4-double",
    "bnb_4bit_compute_dtype": "model.dtype",
    "use_qlora": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "init_lora_weights": "adapter.init",
    "target_modules": "adapter.targets",
    "rank": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_r": "adapter.r",
    "extends": "the first line of a config file, and no override",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and what it `extends`, apply `section.key=value` overrides in order, and check everything.

    Raises `InputError` naming the file and listing all mistakes: unknown keys with the nearest known one,
    missing keys, wrong types (a number written as text is one), and values out of bounds.
    """
    stack = layers(path)
    values: dict[str, Any] = {}
    for _, own in stack:
        values = _over(values, own)
    for override in overrides:
        apply_override(values, override)
    below = [str(file) for file, _ in stack[:-1]]
    source = f"{path} (extends {', '.join(below)})" if below else str(path)
    return check_config(values, source=f"{source} with {' '.join(overrides)}" if overrides else source)


def layers(path: str | Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A config file and what it `extends`, each with its own values, the weakest first.

    `extends` is one file or a list, relative to the file that says so; a later one wins, and the file's own keys win
    over all. `above` are the files on the way here. Raises InputError where a file cannot be read, or extends itself.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        where = f"{above[-1]}: extends: " if above else ""
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}cannot read the config {file}: {reason}") from error
    values = parse_yaml(text, source=str(file))
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{file}: found {found}; a config is a mapping of {_names(Config)}")
    stated = values.pop("extends", [])
    extended = [stated] if isinstance(stated, str) else stated
    if not isinstance(extended, list) or not all(isinstance(name, str) and name for name in extended):
        raise InputError(f"{file}: extends: found {stated!r}; allowed: a config file, or a list of them")
    chain = (*above, file)
    below = []
    for name in extended:
        if (other := file.parent / name).resolve() in {place.resolve() for place in chain}:
            raise InputError(f"{file}: extends: {name} leads back to itself ({' > '.join(map(str, chain))})")
        below += layers(other, chain)
    return [*below, (file, values)]


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key inside sections; a list, a single value or null replaces what is below."""
    both = dict(below)
    for key, value in above.items():
        inside = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        both[key] = _over(below[key], value) if inside else value
    return both


def check_config(values: Mapping[str, Any], source: str = "config") -> Config:
    """The checked `Config` of plain nested values, or one `InputError` that lists every mistake in them."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        lines = [line for details in error.errors() for line in _describe(details)]
        raise InputError("\n  ".join([f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}", *lines])) from None


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.key=value` overrides in order. Raises InputError for what they leave no run of."""
    values = config.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    return check_config(values, source=f"{config.name} with {' '.join(overrides)}")


def resolved_yaml(config: Config) -> str:
    """All values of a run, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    return dump_yaml(config.model_dump(mode="json"))


def known_keys() -> list[str]:
    """Every dotted key a config may have with the installed transformers, in the order of the schema.

    A source's keys stand under `data.train` and `data.eval`, without their number in the list.
    """
    keys = list(_keys(Config))
    fields = [name for name in installed_fields() if name in RULES and f"training.{name}" not in keys]
    return keys + [
        f"training.{name}" for name in fields if RULES[name].kind == "supported" and not RULES[name].config_key
    ]


def _keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is None or inner is Source:
            yield prefix + name
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that `annotation` is, holds a list of, or allows beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for inner in map(_section_in, get_args(annotation)) if inner), None)


def training_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `FocalPOConfig` for a run, with our keys translated to the installed transformers.

    `output_dir` is the caller's: the run folder is not part of the config.
    """
    training, objective, reference = config.training, config.objective, config.reference
    arguments: dict[str, Any] = {
        "run_name": config.name,
        "objective": objective.name,
        **{python_name(key): value for key, value in objective.parameters.items()},
        "focal": objective.focal and objective.focal.model_dump(),
        "guard": objective.guard,
        "reference": reference and reference.kind,
        **({} if reference is None else _strategy(reference)),
        "reference_store": reference.store if reference is not None and reference.kind == "cached" else None,
        "identity_probe": reference and _identity_probe(reference),
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "truncation": config.data.truncation,
        "chat_template_kwargs": config.data.chat_template_kwargs or None,
        "layout": config.packing.layout,
        "tokens_per_pack": None if config.packing.tokens == "auto" else config.packing.tokens,
        "recompute": training.activation_checkpointing,
        "adapter_kernels": config.kernels.adapters,
        "elementwise_kernels": config.kernels.elementwise,
        "compile_layers": config.kernels.compile,
        "allow_dropout": config.adapter is not None and config.adapter.allow_dropout,
        "engine": config.engine and config.engine.kind,
        "offload": config.engine and config.engine.offload,
        "pairs_per_step": training.pairs_per_step,
        "keep_order": keeps_order(config.data.steps) or None,
        "loraplus_lr_ratio": training.loraplus_lr_ratio,
        "seed": training.seed,
        "data_seed": training.data_seed,
        **training.fields,
    }
    arguments = {key: value for key, value in arguments.items() if value is not None}  # what is left to the default
    if training.warmup_ratio > 0:
        arguments["warmup_steps"] = training.warmup_ratio  # below 1 it is a share of all steps
    return arguments


def _strategy(reference: Reference) -> dict[str, Any]:
    """What belongs to the reference's kind, and the guide, by the names of `FocalPOConfig`."""
    return {f"reference_{key}": getattr(reference, key) for key in (*KEYS, "guide")}


def _identity_probe(reference: Reference) -> bool | None:
    """Stored log-probs of another model need not be the policy's start; None leaves it to the kind."""
    other = reference.kind == "cached" and reference.model is not None
    return False if other and reference.identity_probe is None else reference.identity_probe


def lora_arguments(adapter: Adapter) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig` for a run's fresh adapter; `target_modules` may be the word all-linear.

    `adapter.trainable_tokens` is not among them: its texts become ids by the tokenizer.
    """
    return {
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "target_modules": adapter.targets,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "init_lora_weights": True if adapter.init == "default" else adapter.init,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "modules_to_save": list(adapter.modules_to_save) or None,
        "task_type": "CAUSAL_LM",
    }


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in nested values; the value is read as YAML, so 1e-5 is a number.

    An item of a list is named by its number from 0, as in data.steps.0.select.keep.
    """
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise InputError(f"{override!r} is not an override; write section.key=value, for example objective.beta=0.1")
    place: Any = values
    for depth, part in enumerate(path[:-1], start=1):
        name = _index(place, part, override)
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}  # a section that is left out, or null
        place = place[name]
        if not isinstance(place, dict | list):
            raise InputError(f"{override!r}: {'.'.join(path[:depth])} is {place!r}, which has no keys inside")
    place[_index(place, path[-1], override)] = parse_yaml(text, source=f"override {key.strip()}")


def _index(place: Any, part: str, override: str) -> Any:
    """A key of a mapping, or the number of an item that a list has."""
    if not isinstance(place, list):
        return part
    if not part.isdecimal() or int(part) >= len(place):
        raise InputError(f"{override!r}: {part!r} is no item of a list of {len(place)}; say 0 to {len(place) - 1}")
    return int(part)


def _describe(details: ErrorDetails) -> Iterable[str]:
    """The line or lines a person reads for one pydantic error."""
    key = ".".join(str(part) for part in details["loc"]) or "config"
    message, found = details["msg"], details["input"]
    usual = f" (for example {key}: {USUAL[key]})" if key in USUAL else ""
    if details["type"] == "extra_forbidden":
        yield f"{key}: {_unknown(key)}"
    elif details["type"] == "missing":
        yield f"{key}: missing; it has no default{usual}"
    elif details["type"] == WORDED:
        yield f"{key}: {message}"
    elif details["type"] == "value_error":
        yield f"{key}: {message.removeprefix('Value error, ')}"
    elif details["type"] == "list_type":
        yield f"{key}: found {found!r} ({type(found).__name__}); it must be a list{_such_as(found)}"
    elif details["type"] == "bool_type":
        yield f"{key}: found {found!r} ({type(found).__name__}); it must be true or false"
    elif details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        yield f"{key}: found {found!r}; it must be a mapping of keys{usual}"
    elif key == "objective.name":
        yield f"{key}: {unknown(found)}"
    else:
        allowed = re.sub(r"^(Input|String) should ", "it must ", message)
        yield f"{key}: found {found!r} ({type(found).__name__}); {allowed}"


def _such_as(found: Any) -> str:
    return f", such as {json.dumps([found], ensure_ascii=False)}" if isinstance(found, str | int | float) else ""


def _unknown(key: str) -> str:
    """What to say about an unknown key: what another tool's is called here, the nearest spelling, or what there is."""
    key = re.sub(r"\.\d+(?=\.|$)", "", key)  # data.train.0.weight is told of as data.train.weight
    section, _, last = key.rpartition(".")
    if last in ELSEWHERE:
        return f"unknown key; here that is {ELSEWHERE[last]}"
    keys = known_keys()
    under = [known.removeprefix(f"{section}.").partition(".")[0] for known in keys if known.startswith(f"{section}.")]
    inside = [f"{section}.{child}" for child in dict.fromkeys(under)] if section else [*Config.model_fields]
    near = _nearest(last, keys, 1.0) or _nearest(last, inside, 0.5) or _nearest(last, keys, 0.7)
    hint = f"did you mean {near}?" if near else f"known here: {', '.join(inside) or _names(Config)}"
    return f"unknown key; {hint}"


def _nearest(name: str, keys: Iterable[str], cutoff: float) -> str | None:
    """The dotted key whose last part is most like `name`, if at least as much as `cutoff` (1: the same)."""
    by_name = {key.rpartition(".")[2]: key for key in reversed([*keys])}  # the first of two of one name
    return next((by_name[match] for match in difflib.get_close_matches(name, by_name, 1, cutoff)), None)


def _names(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)
