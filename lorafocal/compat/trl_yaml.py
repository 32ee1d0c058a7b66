"""From TRL: the YAML of `trl dpo --config` to the YAML of `lorafocal train`, with a comment a key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

from lorafocal.arguments import FocalPOConfig
from lorafocal.compat.trl import defaults
from lorafocal.compat.trl_fields import FATES, Given, Values, checkpointing, fate_of, trains_in_bf16, translate
from lorafocal.config import check_config
from lorafocal.errors import InputError
from lorafocal.training_fields import RULES, accepts
from lorafocal.yaml12 import dump_yaml, parse_yaml

FILL_IN = "FILL IN: the commit of the data set, 40 hex digits"
PARTS = (DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)  # what `trl dpo` parses
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Keys of `trl dpo` beside DPOConfig's whose every other value cannot be honoured, with the value that asks for nothing.
_REFUSED: dict[str, tuple[Any, str]] = {
    "lora_target_parameters": (None, "adapters go on linear layers; name them in lora_target_modules"),
    "lora_task_type": ("CAUSAL_LM", "only causal language models are trained"),
    "dataset_config": (None, "a data set's configuration cannot be named; export its rows and give --data FILE"),
    "dataset_streaming": (False, "rows are read whole, so that they can be ordered; leave it out"),
    "streaming": (False, "rows are read whole, so that they can be ordered; leave it out"),
    "ignore_bias_buffers": (False, "buffers of a frozen base are not synchronised anyway; leave it out"),
    "env": (None, "set environment variables where the command is started"),
}  # fmt: skip
_NO_EFFECT = {
    "attn_implementation": "attention is chosen here, by the layout; results do not depend on it",
    "bnb_4bit_quant_storage": "weights are held in bitsandbytes' own type; results do not depend on it",
}
# Where a translated key goes; what stands under `training` keeps its name.
_PLACES = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "use_bnb_nested_quant": "model.quantization",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_target_modules": "adapter.targets",
    "lora_dropout": "adapter.dropout",
    "lora_modules_to_save": "adapter.modules_to_save",
    "use_rslora": "adapter.use_rslora",
    "use_dora": "adapter.use_dora",
    "disable_dropout": "adapter.allow_dropout",
    "use_peft": "adapter",
    "dataset_name": "data.train",
    "dataset_train_split": "data.train",
    "datasets": "data.train",
    "dataset_test_split": "data.eval",
    "test_split_size": "data.held_out",
    "max_length": "data.max_length",
    "truncation_mode": "data.truncation",
    "beta": "objective.beta",
    "per_device_train_batch_size": "training.pairs_per_step",
    "gradient_accumulation_steps": "training.pairs_per_step",
    "gradient_checkpointing": "training.activation_checkpointing",
    "activation_checkpointing": "training.activation_checkpointing",
    "output_dir": "name",
    "run_name": "name",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a TRL file does not say: the objective, files in place of its data sets, and the number of processes."""

    objective: str = "focalpo"
    gamma: float | None = None
    data: str | None = None
    eval_data: str | None = None
    processes: int = 1


@dataclass(frozen=True, slots=True)
class File:
    """A TRL file: what it says, and beside it TRL's defaults for what it does not."""

    said: Values
    values: Values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def config_from_trl(path: str | Path, options: Options = Options()) -> tuple[dict[str, Any], list[str]]:
    """A config's nested values for a `trl dpo` file, TRL's defaults included, and notes on what differs.

    Raises InputError listing every key that is unknown or cannot be honoured, with the way out.
    """
    config, notes, _ = _translated(Path(path), options)
    return config, notes


def yaml_from_trl(path: str | Path, options: Options = Options()) -> str:
    """The same as YAML text: the notes on top, and beside each key the TRL key it comes from."""
    config, notes, file = _translated(Path(path), options)
    origins = _origins(file, options)
    lines = [f"# From {Path(path).name}, a file for `trl dpo`.", *(f"# Note: {note}." for note in notes)]
    for section, content in config.items():
        lines += ["", f"{section}:"] if isinstance(content, Mapping) else []
        keys = content.items() if isinstance(content, Mapping) else [("", content)]
        for key, value in keys:
            place = f"{section}.{key}" if key else section
            lines += _lines(key or section, value, origins.get(place, ""), indent="  " if key else "")
    return "\n".join(lines) + "\n"


def _origins(file: File, options: Options) -> dict[str, str]:
    """Where each value comes from: the TRL keys that were said, or TRL's default."""
    said: dict[str, list[str]] = {}
    for key in file.values:
        said.setdefault(_PLACES.get(key, f"training.{key}"), []).extend([key] if key in file.said else [])
    origins = {place: ", ".join(keys) or "TRL's default" for place, keys in said.items()}
    step = f"{file['per_device_train_batch_size']} a device, {file['gradient_accumulation_steps']} accumulated"
    return origins | {
        "name": ", ".join(said["name"]),
        "training.pairs_per_step": f"{step}, on {options.processes} process{'es' * (options.processes > 1)}",
        "training.warmup_ratio": "warmup_ratio" if "warmup_ratio" in file.said else "warmup_steps",
        **({"data.train": "--data"} if options.data else {}),
        **({"data.eval": "--eval-data"} if options.eval_data else {}),
    }


def _lines(key: str, value: Any, origin: str, *, indent: str) -> list[str]:
    """One key as YAML with where it comes from; a value of several lines has that above it."""
    text = dump_yaml({key: value}).rstrip("\n").replace("revision: null\n", f"revision: null  # {FILL_IN}\n")
    lines = [indent + line for line in text.split("\n")]
    if not origin:
        return lines
    return [f"{lines[0]}  # {origin}"] if len(lines) == 1 else [f"{indent}# {origin}", *lines]


def _translated(path: Path, options: Options) -> tuple[dict[str, Any], list[str], File]:
    file, problems = _read(path)
    known = {spec.name for spec in fields(DPOConfig)} | FATES.keys()
    training = Given({key: value for key, value in file.values.items() if key in known}, options.processes)
    translation = translate(training, defaults(FocalPOConfig), defaults(DPOConfig), said=file.said)
    problems += translation.problems
    notes = [f"{key}: no effect, {why}" for key in file.said if (why := _without_effect(key))]
    if options.objective == "focalpo":
        notes.append("objective: the file is for DPO; FocalPO takes its place here (--objective dpo keeps it)")
    config: dict[str, Any] = {"name": _name(file, path)}
    sections: dict[str, Callable[[], dict[str, Any] | None]] = {
        "model": lambda: _model(file, notes),
        "adapter": lambda: _adapter(file, notes),
        "data": lambda: _data(file, options, notes),
    }
    for name, section in sections.items():
        try:
            if (content := section()) is not None:
                config[name] = content
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n  ".join([f"{path.name} cannot be translated:", *problems]))
    config["data"] |= {key: translation.arguments[key] for key in ("max_length", "truncation")}
    gamma = {} if options.gamma is None else {"gamma": options.gamma}
    config["objective"] = {"name": options.objective, "beta": translation.arguments["beta"]} | gamma
    moved = {key: translation.arguments.pop(f"reference_{key}", None) for key in ("every", "mixing")}
    config["reference"] = {"kind": "disabled_adapter" if file["use_peft"] else "cached"}
    if translation.arguments.pop("reference", None) is not None:
        config["reference"] = {"kind": "moving", **moved}
    elif not file["use_peft"]:
        notes.append("reference: TRL holds a second model; here `lorafocal cache-reference` stores its log-probs first")
    config["training"] = _training(file, translation.arguments)
    check_config(config, source=f"{path.name}, translated")
    return config, notes, file


def _read(path: Path) -> tuple[File, list[str]]:
    """The file over TRL's defaults, and one message for each key that is unknown, refused or of the wrong type."""
    try:
        said = parse_yaml(path.read_text(encoding="utf-8"), source=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(said, dict):
        raise InputError(f"{path.name}: found {type(said).__name__}; a file of `trl dpo` is a mapping of keys")
    specs = {spec.name: spec for part in PARTS for spec in fields(part)}
    known = specs.keys() | FATES.keys() | _REFUSED.keys() | _PLACES.keys()
    problems = []
    for key, value in said.items():
        if key not in known:
            near = difflib.get_close_matches(key, specs, n=1)
            problems.append(f"{key}: `trl dpo` has no such key" + (f"; did you mean {near[0]}?" if near else ""))
        elif key in _REFUSED and value != _REFUSED[key][0]:
            problems.append(f"{key}: found {value!r}; {_REFUSED[key][1]}")
        elif key in specs and (key in FATES or key not in RULES) and not _fits(specs[key].type, value):
            problems.append(
                f"{key}: found {value!r} ({type(value).__name__}); it must be of type {_written(specs[key].type)}"
            )
    unset = {key: value for part in PARTS for key, value in defaults(part).items()}
    return File(said, unset | said), problems


def _fits(kind: Any, value: Any) -> bool:
    """Whether argparse would take the value: a list may also be one item; what is no plain type is checked later."""
    written = _written(kind)
    if written.startswith("list") and isinstance(value, str):
        return True
    return not re.fullmatch(r"(bool|int|float|str|list\[str\]|None|[ |])+", written) or accepts(written, value)


def _written(kind: Any) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


def _without_effect(key: str) -> str:
    """Why a key changes nothing here; empty where it does, or is refused."""
    fate = fate_of(key)
    return fate.reason if fate and fate.kind == "no_effect" else _NO_EFFECT.get(key, "")


# ---- the sections


def _name(file: File, path: Path) -> str:
    """A run name from TRL's run_name or output_dir, else from the file's own name."""
    wanted = file["run_name"] or Path(file["output_dir"] or path.stem).name
    return re.sub(r"[^a-z0-9._-]+", "-", str(wanted).lower()).strip("-._")[:64] or "from-trl"


def _model(file: File, notes: list[str]) -> dict[str, Any]:
    """Name, commit if there is one, dtype, and how the base is quantised."""
    if file["model_name_or_path"] is None:
        raise InputError("model_name_or_path: missing; name the base model")
    revision = file["model_revision"]
    if revision in (None, "main"):
        notes.append("model.revision: not pinned; the base changes when its repository does")
        revision = None
    elif not _COMMIT.fullmatch(revision):
        raise InputError(f"model_revision: found {revision!r}, which can move; give the commit, 40 hex digits")
    model = {"name": file["model_name_or_path"], "revision": revision, "dtype": _dtype(file, notes)}
    return model | _quantization(file, notes)


def _quantization(file: File, notes: list[str]) -> dict[str, str]:
    """TRL's four keys are one word here; nothing where the base is not quantised."""
    four, eight = file["load_in_4bit"], file["load_in_8bit"]
    if four and eight:
        raise InputError("load_in_8bit: load_in_4bit is set too; say one of them")
    if not four:
        idle = [key for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant") if key in file.said]
        notes += [f"{key}: no effect, in TRL neither, without load_in_4bit: true" for key in idle]
    if not four and not eight:
        return {}
    notes.append("adapter: TRL trains adapters on a quantised base in bfloat16; here they are float32")
    if eight:
        notes.append("load_in_8bit: without outlier columns here, which depend on what else is in the batch")
        return {"quantization": "int8"}
    return {"quantization": file["bnb_4bit_quant_type"] + "-double" * file["use_bnb_nested_quant"]}


def _dtype(file: File, notes: list[str]) -> str:
    """The base's dtype, in which it also computes."""
    stated = file.said.get("dtype", file.said.get("torch_dtype", file["dtype"]))
    if stated == "float16":
        raise InputError("dtype: found 'float16', which overflows in preference losses; use bfloat16")
    if trains_in_bf16(file.values):
        if stated != "bfloat16" and file["use_peft"]:  # every parameter is trained in float32 here too
            notes.append("model.dtype: TRL computes in bfloat16 over a float32 base; here the base is bfloat16 as well")
        return "bfloat16"
    if stated not in ("bfloat16", "float32"):
        raise InputError(f"dtype: found {stated!r} with bf16 off; say bfloat16 or float32")
    return str(stated)


def _adapter(file: File, notes: list[str]) -> dict[str, Any] | None:
    """None where TRL trains every parameter."""
    if not file["use_peft"]:
        notes += [f"{key}: no effect, in TRL neither, without use_peft: true" for key in file.said if "lora_" in key]
        return None
    targets = file["lora_target_modules"]
    if targets is None:
        raise InputError(
            "lora_target_modules: missing; TRL leaves it to PEFT, which goes by the architecture (q_proj and v_proj in"
            " Llama, Mistral, Qwen2): state the layers, or all-linear"
        )
    listed = [targets] if isinstance(targets, str) else targets
    targets = "all-linear" if listed == ["all-linear"] else listed
    adapter = {"r": file["lora_r"], "alpha": file["lora_alpha"], "targets": targets}
    if file["disable_dropout"] and file["lora_dropout"]:
        notes.append(f"lora_dropout: TRL's disable_dropout switches {file['lora_dropout']} off; so it is 0 here")
    elif file["lora_dropout"]:
        adapter |= {"dropout": file["lora_dropout"], "allow_dropout": True}
    if file["lora_modules_to_save"]:
        adapter["modules_to_save"] = file["lora_modules_to_save"]
    return adapter | {key: True for key in ("use_rslora", "use_dora") if file[key]}


def _data(file: File, options: Options, notes: list[str]) -> dict[str, Any]:
    evaluates = file["eval_strategy"] != "no"
    data: dict[str, Any] = {}
    if options.data is not None:
        data["train"] = options.data
    elif file["datasets"]:
        data["train"] = [_source(entry, place) for place, entry in enumerate(file["datasets"])]
    elif file["dataset_name"]:
        data["train"] = [_hub(file["dataset_name"], file["dataset_train_split"])]
    else:
        raise InputError("dataset_name: missing; name a data set, or give a file of preference rows by --data FILE")
    if options.eval_data is not None:
        data["eval"] = options.eval_data
    elif evaluates and file["test_split_size"]:
        data["held_out"] = file["test_split_size"]
    elif evaluates and options.data is None and not file["datasets"]:
        data["eval"] = [_hub(file["dataset_name"], file["dataset_test_split"])]
    elif evaluates:
        raise InputError("eval_strategy: asks for held-out pairs; give a file of them by --eval-data FILE")
    if any(isinstance(part, list) for part in data.values()):
        notes.append("data: a data set of the hub is read at one commit; fill in `revision`, or give --data FILE")
    return data


def _hub(name: str, split: str) -> dict[str, Any]:
    if Path(name).exists():
        raise InputError(f"dataset_name: {name} is a local path; give its file of preference rows by --data FILE")
    return {"path": name, "revision": None, "split": split}


def _source(entry: Any, place: int) -> dict[str, Any]:
    """One entry of `datasets`; which columns it keeps does not matter here."""
    here = f"datasets[{place}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise InputError(f"{here}: found {entry!r}; an entry has a path")
    stray = sorted(key for key, value in entry.items() if key not in ("path", "split", "columns") and value is not None)
    if stray:
        raise InputError(f"{here}: {', '.join(stray)} cannot be translated; export its rows and give --data FILE")
    return _hub(entry["path"], entry.get("split", "train"))


def _training(file: File, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our own keys, then the fields of `TrainingArguments` that TRL sets otherwise than we do."""
    elsewhere = {
        "beta",
        "max_length",
        "truncation",
        "allow_dropout",
        "pairs_per_step",
        "output_dir",
        "run_name",
        "seed",
    }
    own: dict[str, Any] = {"pairs_per_step": arguments["pairs_per_step"]}
    passed = {key: value for key, value in arguments.items() if key not in elsewhere and key != "recompute"}
    if 0 < passed.get("warmup_steps", 0) < 1:
        own["warmup_ratio"] = passed.pop("warmup_steps")
    own["activation_checkpointing"] = "auto" if checkpointing(file.values) else "none"
    seed = file["seed"]
    return own | passed | {"seed": seed, "data_seed": seed if file["data_seed"] is None else file["data_seed"]}
