"""A config rehearsed in a minute: the very run it describes, on a tiny model of its architecture with made-up pairs.

What needs the real model is not rehearsed: its weights, the data and their lengths, memory and speed.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lorafocal import launch, run
from lorafocal.config import Config, check_config
from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.data.toy import DIGITS, toy_preferences, toy_tokenizer
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.evaluate.score import score_file
from lorafocal.lineage import lineage_of
from lorafocal.model.adapters import linear_names, trainable_token_ids
from lorafocal.model.continued import check_same_quantization
from lorafocal.model.load import DTYPES, check_place, check_shape, load_tokenizer, planned
from lorafocal.model.quantized import prequantized
from lorafocal.model.saved import read_lora_config
from lorafocal.model.shrunk import build, shrunk
from lorafocal.optimizers import UNPAGED

STEPS, PAIRS_PER_STEP = 3, 4
ROWS, HELD_OUT_ROWS = STEPS * PAIRS_PER_STEP + 4, 4  # of each source
PACK = 64  # tokens: a step of several packs
SHORTEST = 64  # tokens that a made-up pair must find room in
EVA_RANK = 4  # its directions come from the answers, which are a few tokens here
NOT_REHEARSED = "the real weights and data, their lengths, memory and speed"
ROUNDING = {"bfloat16": 2e-2, "float32": 1e-4}  # of log-probs in other packs, relative
_BY_THE_WEIGHTS = ("pissa", "olora", "loftq", "eva", "orthogonal")  # starts of no higher rank than a layer has
_PLACES = ("model.name", "reference.model", "reference.store")  # whose values are paths of this machine
_LEFT_OUT = ("num_train_epochs", "eval_delay", "logging_strategy")  # what max_steps and three steps leave no room for


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal found: the run went through, and its saved adapter opens and scores as it did in training."""

    name: str
    model: str  # the tiny one, in words
    changed: tuple[str, ...]  # dotted keys of the config
    instead: tuple[str, ...]  # what stood in for what is not here, in words
    steps: int
    first_loss: float
    last_loss: float
    evaluations: int
    checkpoints: int
    scored: int  # held-out pairs that the adapter, loaded again, scores as the run did
    elapsed_s: float
    interrupted_by: int | None = None  # signal number; then nothing else is known

    def __str__(self) -> str:
        if self.interrupted_by is not None:
            return f"stopped: {self.name} was not rehearsed to its end; nothing was kept"
        scored = f"scores {self.scored} held-out pairs as the run did" if self.scored else "scores the training pairs"
        lines = [
            f"rehearsed {self.name} on {self.model}",
            f"  changed: {', '.join(self.changed)}",
            *(f"  instead: {note}" for note in self.instead),
            f"  not rehearsed: {NOT_REHEARSED}",
            f"  {self.steps} steps: loss {self.first_loss:.6f} at the first, {self.last_loss:.6f} at the last;"
            f" {_counted(self.evaluations, 'evaluation')}, {_counted(self.checkpoints, 'checkpoint')}",
            f"  the saved adapter, loaded again, {scored}",
            f"this config runs ({self.elapsed_s:.0f} s); nothing was kept. Its data: `lorafocal check`",
        ]
        return "\n".join(lines)


def rehearse(config: Config, *, quiet: bool = False) -> Rehearsal:
    """Train three steps as `config` says, by `run.train`, in a temporary folder that is gone afterwards.

    The architecture comes from `model.shape`, or from the config.json of a local folder or of the hub's cache; nothing
    is downloaded. Raises what the run itself raises, and InputError where the architecture is not known here.
    """
    if launch.world_size() > 1:
        raise InputError("a rehearsal is one process: start it without a launcher, as `lorafocal train CONFIG --tiny`")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lorafocal-rehearsal-") as folder:
        try:
            stage = set_stage(config, Path(folder))
            if stage.config.reference is not None and stage.config.reference.kind == "cached":
                run.cache_reference(stage.config, quiet=quiet)
            summary = run.train(stage.config, quiet=quiet, runs_dir=Path(folder) / "runs")
            if summary.interrupted_by is not None:
                return _stopped(config, stage, summary.interrupted_by)
            scored = _check_saved(stage.config, summary)
        except InputError as error:
            raise InputError(
                f"{error}\n(from a rehearsal of {config.name}, on a tiny model and made-up pairs; where this speaks of"
                " sizes or pairs, they may be to blame)"
            ) from error
        lines = [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]
        checkpoints = len(list(summary.folder.glob("checkpoint-*")))
    losses = [line["loss"] for line in lines if "loss" in line]
    return Rehearsal(
        name=config.name,
        model=stage.model,
        changed=changed_keys(config, stage.config),
        instead=stage.instead,
        steps=summary.steps,
        first_loss=losses[0],
        last_loss=losses[-1],
        evaluations=sum("eval_loss" in line for line in lines),
        checkpoints=checkpoints,
        scored=scored,
        elapsed_s=time.perf_counter() - start,
    )


def _stopped(config: Config, stage: Stage, signal: int) -> Rehearsal:
    return Rehearsal(config.name, stage.model, (), stage.instead, 0, math.nan, math.nan, 0, 0, 0, 0.0, signal)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


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
    adapter = _adapter(config, quantization, instead)
    _look_up_tokens(config, instead)
    tokenizer = _tokenizer(config, adapter)
    numbered = any(re.search(r"\d", name) for name in _layer_names(adapter))
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
    values["adapter"] = _fitted(adapter, narrowest)
    values["data"] = _data(config, folder)
    values["training"] = _training(config, instead)
    asked = config.packing.tokens
    values["packing"]["tokens"] = PACK if asked == "auto" else min(asked, PACK)
    if config.adapter.start_from is not None:
        start = _first_adapter(values, folder)
        values["adapter"] = {"start_from": str(start), "allow_dropout": config.adapter.allow_dropout}
    described = _described(real.get_text_config(), small.get_text_config(), values["model"])
    return Stage(check_config(values, source="rehearsal"), described, tuple(instead))


def architecture(config: Config) -> tuple[PreTrainedConfig, str | None]:
    """The base's transformers config, and the word for how its layers are held: as asked for, or as they are stored.

    Raises InputError where neither `model.shape` nor a config.json on this machine says it, or the two disagree.
    """
    name, shape = config.model.name, config.model.shape
    if shape is None:
        check_place(name)
    try:
        found = AutoConfig.from_pretrained(name, revision=config.model.revision, local_files_only=True)
    except (OSError, ValueError) as error:
        if shape is None:
            raise InputError(
                f"a rehearsal must know the architecture of {name}, whose config.json is not on this machine: state its"
                " values as model.shape, model_type first, or fetch that one file (`hf download MODEL config.json`)"
            ) from error
        try:
            return AutoConfig.for_model(**shape), config.model.quantization
        except (ValueError, TypeError, StrictDataclassError) as reason:
            raise InputError(f"model.shape describes no model: {str(reason).splitlines()[0]}") from reason
    check_shape(found, shape or {})
    stored = prequantized(found, name)
    if stored is not None:
        del found.quantization_config
        if config.adapter.init == "loftq":
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


def _tokenizer(config: Config, adapter: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The toy task's, whose template reads every option that the config gives, with the tokens that are trained."""
    tokenizer = toy_tokenizer()
    trained = [token for token in adapter["trainable_tokens"] if isinstance(token, str)]
    tokenizer.add_tokens(trained, special_tokens=True)
    options = [name for name in config.data.chat_template_kwargs if name.isidentifier()]
    read = "".join(f"{{% if {name} is defined %}}{{% endif %}}" for name in options)
    tokenizer.chat_template = read + str(tokenizer.chat_template)
    return tokenizer


# --- the adapter --------------------------------------------------------------------------------------------


def _adapter(config: Config, quantization: str | None, instead: list[str]) -> dict[str, Any]:
    """The section `adapter` of a fresh adapter: the config's own, or one like that which it continues.

    Raises InputError where that one was trained on a base held otherwise.
    """
    section = config.adapter.model_dump(mode="json")
    if config.adapter.start_from is None:
        return section
    folder = Path(config.adapter.start_from)
    section["start_from"] = None
    if not folder.exists():
        instead.append(f"adapter.start_from: a new LoRA of rank 8, for {folder} is not here")
        return section | {"r": 8, "alpha": 16}
    lora, lineage = read_lora_config(folder), lineage_of(folder)
    if lineage is not None and (quantization is not None or config.model.shape is None):
        check_same_quantization(
            folder, lineage, quantization
        )  # a base known by its shape alone may be stored in 4 bits
    instead.append(f"adapter.start_from: a new adapter of rank {lora.r}, as {folder} has it, trained for one step")
    return section | {
        "r": lora.r,
        "alpha": int(lora.lora_alpha),
        "targets": "all-linear" if isinstance(lora.target_modules, str) else sorted(lora.target_modules or ()),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "modules_to_save": list(lora.modules_to_save or []),
        "trainable_tokens": list(lora.trainable_token_indices or []),
    }


def _look_up_tokens(config: Config, instead: list[str]) -> None:
    """Find the trained tokens in the real tokenizer where it is a file here; the tiny model's has them all."""
    name, tokens = config.model.name, config.adapter.trainable_tokens
    if not tokens:
        return
    if (Path(name) / "tokenizer.json").is_file():
        trainable_token_ids(tokens, load_tokenizer(name))
    else:
        instead.append(f"adapter.trainable_tokens: of a made-up vocabulary; whether {name} has them was not looked up")


def _layer_names(adapter: Mapping[str, Any]) -> list[str]:
    targets = adapter["targets"]
    names = [] if isinstance(targets, str) else list(targets)
    return [*names, *adapter["rank_pattern"], *adapter["alpha_pattern"], *adapter["modules_to_save"]]


def _fitted(adapter: Mapping[str, Any], narrowest: int) -> dict[str, Any]:
    """The adapter on narrow layers: token ids among the few there are, a rank that its start can have there."""
    ids = [token for token in adapter["trainable_tokens"] if isinstance(token, int)]
    places = {token: len(toy_tokenizer()) - 1 - place % len(DIGITS) for place, token in enumerate(ids)}
    fitted = {**adapter, "trainable_tokens": [places.get(token, token) for token in adapter["trainable_tokens"]]}
    if not str(adapter["init"]).startswith(_BY_THE_WEIGHTS):
        return fitted
    most = min(narrowest, EVA_RANK) if adapter["init"] == "eva" else narrowest
    rank = min(adapter["r"], most)
    return fitted | {
        "r": rank,
        "alpha": max(1, round(adapter["alpha"] * rank / adapter["r"])),
        "rank_pattern": {name: min(r, most) for name, r in adapter["rank_pattern"].items()},
    }


def _first_adapter(values: Mapping[str, Any], folder: Path) -> Path:
    """Train the adapter that is to be continued for one supervised step; returns its folder."""
    training = {k: v for k, v in values["training"].items() if not k.startswith(("eval_", "save_"))}
    data = values["data"] | {"eval": None, "held_out": None}
    first = {
        **values,
        "name": "first",
        "objective": {"name": "sft"},
        "reference": None,
        "data": data,
        "training": training | {"max_steps": 1},
    }
    return run.train(check_config(first, source="rehearsal"), quiet=True, runs_dir=folder / "runs").folder / "adapter"


# --- data and training --------------------------------------------------------------------------------------


def _data(config: Config, folder: Path) -> dict[str, Any]:
    """The section `data` with made-up conversations in the place of each source."""
    data, section = config.data, config.data.model_dump(mode="json")
    for name, rows_each, held_out in (("train", ROWS, False), ("eval", HELD_OUT_ROWS, True)):
        sources = getattr(data, name) or []
        if not sources:
            continue
        rows = toy_preferences(rows_each * len(sources), seed=1, held_out=held_out)
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
        "max_length": max(data.max_length, SHORTEST),
        "max_prompt_length": None if data.max_prompt_length is None else max(data.max_prompt_length, SHORTEST // 2),
        "cache": False,
    }


def _training(config: Config, instead: list[str]) -> dict[str, Any]:
    """The section `training` for three steps with an evaluation and a checkpoint among them."""
    section = {k: v for k, v in config.training.model_dump(mode="json").items() if k not in _LEFT_OUT}
    loggers = section.get("report_to")
    if loggers not in (None, "none", [], ["none"]):
        instead.append(f"training.report_to: none, and nothing was sent to {loggers}")
    on_gpu = torch.cuda.is_available() and not section.get("use_cpu", False)
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


# --- what came out ------------------------------------------------------------------------------------------


def _check_saved(config: Config, summary: run.RunSummary) -> int:
    """Open the saved adapter and score with it: how many held-out pairs it scores as the last evaluation did.

    Raises UnhealthyRun where it does not.
    """
    adapter, held_out = summary.folder / run.ADAPTER_DIR, summary.folder / HELD_OUT_FILE
    if not held_out.is_file():
        score_file(adapter, Path(config.data.train[0].path))
        return 0
    report = score_file(adapter, held_out)
    found = report.as_dict()
    for key in ("logps/chosen", "logps/rejected"):
        expected = summary.held_out.get(f"eval_{key}")
        if expected is not None and abs(found[key] - expected) > ROUNDING[config.model.dtype] * abs(expected):
            raise UnhealthyRun(
                f"the adapter of the rehearsal, loaded again, has other log-probs than in training: {key} {found[key]}"
                f" against {expected}. Adapters saved by this config are not to be trusted: please report it"
            )
    return len(report.scores)
