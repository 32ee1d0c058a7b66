"""What a rehearsal plays on: a tiny base of a config's architecture, made-up pairs, and the config with these."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lorafocal import launch
from lorafocal.config import Config, check_config
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.errors import InputError, first_line
from lorafocal.model.adapters import linear_names
from lorafocal.model.load import DTYPES, check_place, check_shape, planned
from lorafocal.model.quantized import prequantized
from lorafocal.model.shrunk import build, shrunk
from lorafocal.objectives.entry import Entry
from lorafocal.optimizers import UNPAGED
from lorafocal.plan.work import config_here
from lorafocal.references.strategy import BASE
from lorafocal.rehearsal.adapter import adapter_section, first_adapter, fitted, layer_names, look_up_tokens

STEPS, PAIRS_PER_STEP = 3, 4
ROWS, HELD_OUT_ROWS = STEPS * PAIRS_PER_STEP + 4, 4  # of each source
PACK = 64  # tokens: a step of several packs
SHORT_ANSWER = 4  # tokens
SHORTEST = 64  # tokens that a made-up pair must find room in
_PLACES = ("model.name", "reference.model", "reference.store")  # whose values are paths of this machine
_LEFT_OUT = ("num_train_epochs", "eval_delay", "logging_strategy")  # what max_steps and three steps leave no room for


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rehearsal plays on: the config of a tiny run whose model and data stand in a folder."""

    config: Config
    model: str
    instead: tuple[str, ...]


def set_stage(config: Config, folder: Path) -> Stage:
    """Write a tiny base, a tokenizer and made-up pairs into `folder`, and say what `config` is with these."""
    instead: list[str] = []
    real, quantization = architecture(config)
    if quantization != config.model.quantization:
        instead.append(f"{config.model.name} is stored as {quantization}; the tiny base is quantised while it loads")
    if config.model.backend != "transformers":
        instead.append(f"the tiny base is loaded by transformers, not by {config.model.backend}")
    adapter = adapter_section(config, quantization, instead)
    look_up_tokens(config, instead)
    tokenizer = _tokenizer(config, adapter)
    numbered = any(re.search(r"\d", name) for name in layer_names(adapter))
    small = shrunk(real, tokens=len(tokenizer), eos=int(tokenizer.eos_token_id), all_layers=numbered)
    narrowest = _write_model(folder / "base", small, tokenizer, config.model.dtype, seed=0)
    if config.reference is not None and config.reference.model is not None:
        same = config.reference.identity_probe is True
        _write_model(folder / "reference", small, tokenizer, config.model.dtype, seed=0 if same else 1)
        instead.append(f"reference.model: a tiny {small.model_type} too, whatever {config.reference.model} is")

    values = config.model_dump(mode="json")
    values["model"] |= {
        "name": str(folder / "base"),
        "revision": None,
        "backend": "transformers",
        "quantization": quantization,
        "shape": None if config.model.shape is None else _values_of(small, config.model.shape),
    }
    if config.reference is not None and config.reference.model is not None:
        values["reference"] |= {"model": str(folder / "reference"), "revision": None}
    if config.reference is not None and config.reference.kind == "cached":
        values["reference"]["store"] = str(folder / "references")
    values["stages"] = None  # the first of several begins as a run of one
    values["adapter"] = fitted(adapter, narrowest)
    values["data"] = _data(config, folder)
    values["training"] = _training(config, instead)
    values["evaluation"] = _evaluation(config, instead)
    asked = config.packing.tokens
    values["packing"]["tokens"] = PACK if asked == "auto" else min(asked, PACK)
    described = _described(real.get_text_config(), small.get_text_config(), values["model"])
    return Stage(check_config(values, source="rehearsal"), described, tuple(instead))


def started(stage: Stage, config: Config, folder: Path) -> Stage:
    """The stage with the finished adapters that `config` continues or compares with, which all processes of the launch
    train now."""
    finished = _finished_adapters(config)
    if not finished:
        return stage
    values = stage.config.model_dump(mode="json")
    made = {place: str(first_adapter(values, folder, number)) for number, place in enumerate(finished)}
    if config.adapter is not None and config.adapter.start_from is not None:
        start = made[config.adapter.start_from]
        values["adapter"] = {"start_from": start, "allow_dropout": config.adapter.allow_dropout}
    if config.reference is not None:
        section = values["reference"]
        section |= {key: made.get(section[key]) for key in ("adapter", "guide")}
        section["members"] = section["members"] and [made.get(member, member) for member in section["members"]]
    notes = (f"{key}: a new adapter trained for one step, for {place}" for place, key in finished.items() if key)
    return replace(stage, config=check_config(values, source="rehearsal"), instead=(*stage.instead, *notes))


def _finished_adapters(config: Config) -> dict[str, str]:
    """The folders of finished adapters that a config names, each with the key of the reference that does."""
    found: dict[str, str] = {}
    if config.adapter is not None and config.adapter.start_from is not None:
        found[config.adapter.start_from] = ""
    if config.reference is not None:
        section = config.reference
        named = [("adapter", section.adapter), *(("members", one) for one in section.members or [])]
        for key, place in (*named, ("guide", section.guide)):
            if place not in (None, BASE):
                found.setdefault(place, f"reference.{key}")
    return found


def joined_by(config: Config) -> dict[str, Any]:
    """What of the trainer's arguments decides how processes find each other, and what they talk through then."""
    fields = config.training.fields
    said: dict[str, Any] = {key: fields[key] for key in ("ddp_backend", "ddp_timeout") if key in fields}
    said |= {} if config.engine is None else {"engine": config.engine.kind, "offload": config.engine.offload}
    return said | ({"use_cpu": True} if _on_cpu(fields) else {})


def _on_cpu(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("use_cpu", False)) or not torch.cuda.is_available()


def architecture(config: Config) -> tuple[PreTrainedConfig, str | None]:
    """The base's transformers config, and the word for how its layers are held: as asked for, or as they are stored.

    Raises InputError where neither `model.shape` nor a config.json on this machine says it, or the two disagree.
    """
    name, shape = config.model.name, config.model.shape
    if shape is None:
        check_place(name)
    try:
        found = AutoConfig.from_pretrained(name, revision=config.model.revision, local_files_only=True)
    except (OSError, ValueError, RecursionError, StrictDataclassError) as error:
        if shape is None:
            here = config_here(config.model) is not None
            why = f"cannot be read ({first_line(error)})" if here else "is not on this machine"
            raise InputError(
                f"a rehearsal must know the architecture of {name}, whose config.json {why}: state its"
                f" values as model.shape, model_type first, or fetch that one file (`{config.model.fetched}`)"
            ) from error
        try:
            return AutoConfig.for_model(**shape), config.model.quantization
        except (ValueError, TypeError, StrictDataclassError) as reason:
            raise InputError(f"model.shape describes no model: {first_line(reason)}") from reason
    check_shape(found, shape or {})
    stored = prequantized(found, name)
    if stored is not None:
        del found.quantization_config
        if config.adapter is not None and config.adapter.init == "loftq":
            raise InputError(
                f"adapter.init: loftq needs the float weights of the base, and {name} is stored as {stored}: use its"
                " float original (`model.quantization: nf4`), or `adapter.init: default`"
            )
    return found, planned(config.model.quantization, stored, name)


def changed_keys(config: Config, derived: Config) -> tuple[str, ...]:
    """The dotted keys in which two configs differ, with both values where these are short numbers or words."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        inside: dict[str, Any] = {}
        for key, value in values.items():
            nested = isinstance(value, dict) and prefix == ""
            inside |= flat(value, f"{key}.") if nested else {prefix + key: value}
        return inside

    ours, theirs = flat(config.model_dump(mode="json")), flat(derived.model_dump(mode="json"))
    changed = []
    for key in dict.fromkeys([*ours, *theirs]):
        old, new = ours.get(key), theirs.get(key)
        plain = isinstance(new, str | int | float | None) and not key.startswith(_PLACES)
        if old != new and key != "adapter.start_from":
            changed.append(f"{key} {'left out' if new is None else new}" if plain else key)
    return tuple(changed)


# --- the tiny model -----------------------------------------------------------------------------------------


def _write_model(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: str, *, seed: int
) -> int:
    """Save a random model with the tokenizer; returns the fewest inputs or outputs that an adapted layer has."""
    model = build(config, dtype=DTYPES[dtype], seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return min(min(model.get_submodule(name).weight.shape) for name in linear_names(model))


def _values_of(config: PreTrainedConfig, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `config` has for the keys that `shape` states."""
    values = config.to_dict()
    return {key: values[key] if key in values else getattr(config, key) for key in shape}


def _described(real: PreTrainedConfig, small: PreTrainedConfig, model: Mapping[str, Any]) -> str:
    held = f"{model['quantization']} in {model['dtype']}" if model["quantization"] else model["dtype"]
    return (
        f"a tiny {small.model_type}: {small.num_hidden_layers} of {real.num_hidden_layers} layers, {small.hidden_size}"
        f" of {real.hidden_size} wide, {small.num_attention_heads} of {real.num_attention_heads} heads,"
        f" {small.vocab_size} of {real.vocab_size} tokens; {held}"
    )


def _tokenizer(config: Config, adapter: Mapping[str, Any] | None) -> PreTrainedTokenizerBase:
    """The toy task's, whose template reads every option that the config gives, with the tokens that are trained."""
    tokenizer = toy_tokenizer()
    named = [] if adapter is None else adapter["trainable_tokens"]
    trained = [token for token in named if isinstance(token, str)]
    tokenizer.add_tokens(trained, special_tokens=True)
    options = [name for name in config.data.chat_template_kwargs if name.isidentifier()]
    read = "".join(f"{{% if {name} is defined %}}{{% endif %}}" for name in options)
    tokenizer.chat_template = read + str(tokenizer.chat_template)
    return tokenizer


# --- data and training --------------------------------------------------------------------------------------


def _data(config: Config, folder: Path) -> dict[str, Any]:
    """The section `data` with made-up conversations in the place of each source."""
    data, section = config.data, config.data.model_dump(mode="json")
    for name, rows_each, held_out in (("train", ROWS, False), ("eval", HELD_OUT_ROWS, True)):
        sources = getattr(data, name) or []
        if not sources:
            continue
        rows = _rows(config.objective.entry, rows_each * len(sources), held_out=held_out)
        section[name] = []
        for place, source in enumerate(sources):
            file = folder / f"{name}-{place + 1}.jsonl"
            mine = rows[place * rows_each : (place + 1) * rows_each]
            file.write_text("".join(json.dumps(row) + "\n" for row in mine), encoding="utf-8")
            section[name].append({"path": str(file), "weight": source.weight if name == "train" else 1.0})
    return section | {
        "form": None,
        "columns": {},
        "revision": None,
        "split": None,
        "held_out": None if data.held_out is None else HELD_OUT_ROWS,
        "leave_out": None,
        "steps": None,
        "max_length": max(data.max_length, SHORTEST),
        "max_prompt_length": None if data.max_prompt_length is None else max(data.max_prompt_length, SHORTEST // 2),
        "cache": False,
    }


def _rows(entry: Entry, count: int, *, held_out: bool) -> list[dict[str, Any]]:
    """Made-up preference rows with what the objective asks of them."""
    rows = toy_preferences(count, seed=1, held_out=held_out)
    for number, row in enumerate(rows):
        if entry.scores:  # of the rule, with gaps that differ
            row |= {"score_chosen": (1 + number % 3) / 4, "score_rejected": 0.0}
        if entry.others:
            answer = " ".join([row["rejected"][0]["content"]] * 2)
            row |= {"others": [{"answer": answer, "score": 0.0}]}
        if entry.groups:
            row |= {"group": "ab"[number % 2]}
        if entry.embeddings:
            row |= {"prompt_embedding": [1.0, float(number % 3)]}
    return rows


def _training(config: Config, instead: list[str]) -> dict[str, Any]:
    """The section `training` for three steps with an evaluation and a checkpoint among them."""
    section = {k: v for k, v in config.training.model_dump(mode="json").items() if k not in _LEFT_OUT}
    loggers = section.get("report_to")
    if loggers not in (None, "none", [], ["none"]):
        instead.append(f"training.report_to: none, and nothing was sent to {loggers}")
    on_gpu = not _on_cpu(section)
    if launch.world_size() > 1 and not on_gpu and not section.get("use_cpu", False):
        section["use_cpu"] = True
        instead.append(f"training.use_cpu: {launch.world_size()} processes on this machine's CPU, for it has no GPU")
    optimizer = str(section.get("optim", ""))
    if optimizer in UNPAGED and not on_gpu:
        section["optim"] = UNPAGED[optimizer]
        instead.append(f"training.optim: {section['optim']}, for {optimizer} pages a GPU's memory, and there is none")
    if section.get("tf32") and not on_gpu:
        del section["tf32"]
        instead.append("training.tf32: left out, for it is arithmetic of a GPU, and there is none")
    if section.get("save_strategy", "steps") == "steps":
        section["save_steps"] = STEPS - 1
    if section.get("eval_strategy") == "steps":
        section["eval_steps"] = STEPS - 1
    pairs = min(config.training.pairs_per_step, PAIRS_PER_STEP)
    return section | {"pairs_per_step": pairs, "max_steps": STEPS, "logging_steps": 1, "report_to": "none"}


def _evaluation(config: Config, instead: list[str]) -> dict[str, Any] | None:
    """The section `evaluation` for three steps, a few prompts and short answers; a reward model is not loaded."""
    if config.evaluation is None:
        return None
    section = config.evaluation.model_dump(mode="json")
    if section["reward_model"] is not None:
        instead.append(f"evaluation.reward_model: the rule exact judged, not {section['reward_model']}")
        section |= {"reward_model": None, "rule": "exact"}
    few = {"count": HELD_OUT_ROWS, "max_new_tokens": SHORT_ANSWER}
    return section | {"every": STEPS - 1} | {key: min(section[key], most) for key, most in few.items()}
