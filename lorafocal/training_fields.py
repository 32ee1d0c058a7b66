"""Every field of transformers' `TrainingArguments`: supported, set by us, or refused with its reason.

The table covers transformers 5.5 to 5.23. The installed version's fields are read from its source with `ast`,
so nothing here imports transformers. A field that a later version adds is refused by name, and fails a test,
until somebody classes it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lorafocal.bounds import is_number
from lorafocal.compatibility import engine_refusal
from lorafocal.errors import InputError


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What lorafocal does with one field of `TrainingArguments`.

    `value` is what we set it to, or for a refused field the neutral value, the only one accepted. `also` are other ways
    to write it: a parser's for a field that nobody named, and what transformers makes of it, which a copy brings along.
    `choices` limits a supported field to these values (empty: any of its type).
    `config_key` names the key that takes the field's place in a config file (empty: the field itself).
    """

    kind: Literal["supported", "set", "refused"]
    value: Any = None
    reason: str = ""
    also: tuple[Any, ...] = ()
    choices: tuple[str, ...] = ()
    config_key: str = ""


def _supported(*choices: str, config_key: str = "") -> FieldRule:
    return FieldRule("supported", choices=choices, config_key=config_key)


def _set(value: Any, reason: str) -> FieldRule:
    return FieldRule("set", value, reason)


def _refused(value: Any, reason: str, *also: Any) -> FieldRule:
    return FieldRule("refused", value, reason, also)


_STEP = "a batch is the whole optimiser step, split into packs; use pairs_per_step and the packing budget"
_LOADER = "the data loader and its sampler are ours (accelerate's repeats pairs on ragged data); nothing reads this"
_EVALUATION = "evaluation adds up sums and counts over pairs and never gathers outputs; nothing reads this"
_HUB = "a run never uploads; publish the finished run folder with the hub's own client"
_SAVE = "checkpoints are our own format (safetensors and JSON, complete or absent)"
_BEST = "the run ends with the last step's adapter; compare checkpoints with `lorafocal score`, merge one of them"
_COMPILE = "attention takes segment bounds from the host, so each pack would be its own graph; nothing replaces it"
_HALF = "half precision overflows in preference losses (NaN, or loss 0 after a step); use bfloat16 or float32"
_SCRIPT = "only example scripts of transformers read it"
_FSDP = "the config's engine says it: engine.kind: fsdp2 (FocalPOConfig: engine='fsdp2')"
# What transformers 5.5 makes of None.
_NO_FSDP = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}
_OF_BITSANDBYTES = ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
_OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd", *_OF_BITSANDBYTES)
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")
# What `lr_scheduler_kwargs` may hold for each schedule.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
_NEEDED = {  # one of these, or the schedule fails once the model is loaded
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}

RULES: dict[str, FieldRule] = {
    # duration and learning rate
    "num_train_epochs": _supported(),
    "max_steps": _supported(),
    "learning_rate": _supported(),
    "lr_scheduler_type": _supported(*SCHEDULES),
    "lr_scheduler_kwargs": _supported(),
    "warmup_steps": _supported(),
    "warmup_ratio": _refused(None, "gone from transformers; warmup_steps below 1 is the same share of all steps"),
    # optimiser
    "optim": _supported(*_OPTIMISERS),
    "optim_args": _refused(
        None, "none of the supported optimisers takes any; use adam_beta1, adam_beta2, adam_epsilon"
    ),
    "optim_target_modules": _refused(
        None, "for low-rank optimisers over full parameters; the adapter targets are set apart"
    ),
    "weight_decay": _supported(),
    "adam_beta1": _supported(),
    "adam_beta2": _supported(),
    "adam_epsilon": _supported(),
    "max_grad_norm": _supported(),
    # the step
    "per_device_train_batch_size": _set(1, _STEP),
    "per_device_eval_batch_size": _set(1, _STEP),
    "gradient_accumulation_steps": _set(1, _STEP),
    "average_tokens_across_devices": _set(
        False, "the loss is a sum over pairs divided by the pairs of the step, on all ranks"
    ),
    "auto_find_batch_size": _refused(
        False, "it restarts with another batch; lower the packing budget: results stay the same"
    ),
    "label_smoothing_factor": _refused(0.0, "it belongs to cross-entropy and would be ignored by a preference loss"),
    "neftune_noise_alpha": _refused(None, "noise on embeddings makes policy and reference differ at the start"),
    "torch_empty_cache_steps": _refused(None, "our training step does not read it; lower the packing budget instead"),
    # precision and model
    "bf16": _set(False, "the base's dtype decides: load it in bfloat16, and it computes under bf16 autocast"),
    "fp16": _refused(False, _HALF),
    "bf16_full_eval": _refused(
        False, "it would cast the fp32 adapters for evaluation; evaluation computes as training does"
    ),
    "fp16_full_eval": _refused(False, _HALF),
    "tf32": _supported(),
    "activation_checkpointing": _supported(),
    "activation_checkpointing_kwargs": _supported(config_key="training.activation_checkpointing"),
    "gradient_checkpointing": _supported(config_key="training.activation_checkpointing"),
    "gradient_checkpointing_kwargs": _supported(config_key="training.activation_checkpointing"),
    "use_cache": _set(False, "scoring whole sequences needs no key/value cache"),
    "torch_compile": _refused(False, _COMPILE),
    "torch_compile_backend": _refused(None, _COMPILE),
    "torch_compile_mode": _refused(None, _COMPILE),
    "use_liger_kernel": _refused(False, "it replaces the output head, which is ours here"),
    "liger_kernel_config": _refused(None, "it replaces the output head, which is ours here"),
    # logging
    "logging_strategy": _supported("no", "steps", "epoch"),
    "logging_steps": _supported(),
    "logging_first_step": _supported(),
    "logging_dir": _refused(None, "deprecated by transformers; set the environment variable TENSORBOARD_LOGGING_DIR"),
    "log_on_each_node": _supported(),
    "log_level": _supported(*_LOG_LEVELS),
    "log_level_replica": _supported(*_LOG_LEVELS),
    "logging_nan_inf_filter": _set(
        False, "the filter hides NaN; a non-finite number stops the run and names its pairs"
    ),
    "include_num_input_tokens_seen": _refused(
        "no", "it measures one tensor of the batch, and a batch here is a list of packs", False
    ),
    "disable_tqdm": _set(True, "the progress line is our own; --quiet silences it"),
    "report_to": _supported(),  # which loggers: LOGGERS
    "run_name": _supported(config_key="name"),
    "project": _supported(),
    "trackio_space_id": _supported(),
    "trackio_bucket_id": _supported(),
    "trackio_static_space_id": _supported(),
    "debug": _refused("", "the run already stops at the first non-finite number and names its pairs", None, []),
    "skip_memory_metrics": _refused(True, "peak memory is measured and logged by us"),
    # evaluation
    "eval_strategy": _supported("no", "steps", "epoch"),
    "eval_steps": _supported(),
    "eval_delay": _supported(),
    "eval_on_start": _supported(),
    "prediction_loss_only": _set(True, _EVALUATION),
    "eval_do_concat_batches": _refused(True, _EVALUATION),
    "eval_use_gather_object": _refused(False, _EVALUATION),
    "eval_accumulation_steps": _refused(None, _EVALUATION),
    "include_for_metrics": _refused([], _EVALUATION),
    "batch_eval_metrics": _refused(False, _EVALUATION),
    "label_names": _set([], "the batch carries its own labels; there are no label columns"),
    # saving and resuming
    "output_dir": _supported(config_key="name"),
    "save_strategy": _supported("no", "steps", "epoch"),
    "save_steps": _supported(),
    "save_total_limit": _supported(),
    "save_only_model": _refused(False, f"{_SAVE} and always resumable"),
    "save_on_each_node": _refused(False, f"{_SAVE}; the first rank writes them"),
    "enable_jit_checkpoint": _refused(False, f"{_SAVE}; a SIGTERM already finishes the step and saves"),
    "resume_from_checkpoint": _refused(
        None, f"{_SCRIPT}; use `lorafocal train CONFIG --resume`, or trainer.train(...)"
    ),
    "ignore_data_skip": _refused(
        False, "a resumed run would see pairs twice; the order is a function of seed and epoch"
    ),
    "restore_callback_states_from_checkpoint": _refused(False, f"{_SAVE}; they hold no state of callbacks"),
    "load_best_model_at_end": _refused(False, _BEST),
    "metric_for_best_model": _refused(None, _BEST),
    "greater_is_better": _refused(None, _BEST),
    "push_to_hub": _refused(False, _HUB),
    "hub_token": _refused(None, f"{_HUB}, and a secret has no place in a config", "<HUB_TOKEN>"),
    "hub_private_repo": _refused(None, _HUB),
    "hub_model_id": _refused(None, _HUB),
    "hub_strategy": _refused("every_save", _HUB),
    "hub_always_push": _refused(False, _HUB),
    "hub_revision": _refused(None, _HUB),
    # seeds
    "seed": _supported(),
    "data_seed": _supported(),
    "full_determinism": _supported(),
    # data loading
    "dataloader_num_workers": _supported(),
    "dataloader_pin_memory": _set(False, "a batch is a few kilobytes of token ids"),
    "dataloader_persistent_workers": _supported(),
    "dataloader_prefetch_factor": _supported(),
    "dataloader_multiprocessing_context": _refused(None, _LOADER),
    "dataloader_in_order": _refused(
        True, "the order of pairs is a function of seed and epoch, so that a run can be resumed"
    ),
    "dataloader_drop_last": _set(False, "the last step of an epoch is a short one; no pair is dropped"),
    "remove_unused_columns": _set(False, "pairs are not columns of a model's signature"),
    "train_sampling_strategy": _refused(
        "random", "packing already fills each pack by length, and the order stays random"
    ),
    "length_column_name": _refused("length", "pairs know their own length; nothing reads this"),
    "accelerator_config": _refused(None, _LOADER),
    # devices and processes
    "use_cpu": _supported(),
    "local_rank": _refused(-1, "the launcher (torchrun) says it through the environment"),
    "ddp_find_unused_parameters": _set(
        False, "every adapter parameter is used in each step; searching for others costs time"
    ),
    "ddp_bucket_cap_mb": _supported(),
    "ddp_broadcast_buffers": _supported(),
    "ddp_backend": _supported(),
    "ddp_timeout": _supported(),
    "ddp_static_graph": _refused(None, "the number of packs changes from step to step, so the graph is not static"),
    "fsdp": _refused(None, _FSDP, []),
    "fsdp_config": _refused(None, _FSDP, _NO_FSDP),
    "deepspeed": _refused(None, "the config's engine says it: engine.kind: zero3 (FocalPOConfig: engine='zero3')"),
    "parallelism_config": _refused(None, engine_refusal("a parallelism config")),
    # read by example scripts only
    "do_train": _refused(False, f"{_SCRIPT}; a run trains"),
    "do_eval": _refused(
        False, f"{_SCRIPT}; use eval_strategy (in a copy of a config that evaluates, say do_eval=False too)"
    ),
    "do_predict": _refused(False, f"{_SCRIPT}; use `lorafocal score`"),
}

# What `report_to` may name, beside none, and the packages (one is enough) that must be installed for it.
LOGGERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "swanlab": ("swanlab",),
}

# Numbers that something else refuses once the model is loaded, or at the first checkpoint.
_WITHIN: dict[str, tuple[float, float]] = {  # (the least, what it stays below)
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),  # NumPy's
    **dict.fromkeys(("eval_delay", "dataloader_num_workers"), (0, math.inf)),
    "max_steps": (-1, 10**12),  # as many as a report reads
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "ddp_timeout"), (1, math.inf)),
}

NO_WARMUP = "lr_scheduler_type constant has none; use constant_with_warmup, or remove it"

# A field without effect unless another one has a certain value: (other field, the value needed, its default).
_NEEDS: dict[str, tuple[str, Any, Any]] = {
    "logging_steps": ("logging_strategy", "steps", "steps"),
    "save_steps": ("save_strategy", "steps", "steps"),
    "eval_steps": ("eval_strategy", "steps", "no"),
}


@lru_cache(maxsize=1)
def installed_fields() -> dict[str, str]:
    """Name and annotation (as written) of each `TrainingArguments` field of the installed transformers.

    Reads the source file, so transformers is not imported. Raises `InputError` when it is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "transformers is not installed; install lorafocal with its dependencies: pip install lorafocal"
        )
    source = Path(next(iter(spec.submodule_search_locations))) / "training_args.py"
    return fields_in_source(source.read_text(encoding="utf-8"))


def fields_in_source(source: str) -> dict[str, str]:
    """The fields of the class `TrainingArguments` in `source`, in order: name -> annotation as written."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            statements = [s for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
            return {s.target.id: ast.unparse(s.annotation) for s in statements if isinstance(s.target, ast.Name)}
    raise InputError("the installed transformers has no class TrainingArguments in training_args.py; use 5.5 or later")


def classify(name: str) -> FieldRule:
    """The rule for a field of `TrainingArguments`; one that no rule knows yet is refused by name.

    Raises `InputError`, with the nearest usable name, where neither the table nor transformers has it.
    """
    if name in RULES:
        return RULES[name]
    if name in installed_fields():
        return _refused(None, "it is not classed yet by this lorafocal, which knows transformers up to 5.23")
    raise InputError(f"unknown field {name!r}{_nearest(name)}")


def check_training_fields(given: Mapping[str, Any]) -> list[str]:
    """One message for each field of `given` (name -> value chosen by the user) that cannot be honoured."""
    errors = []
    for name, value in given.items():
        problem = field_problem(name, value)
        if problem:
            errors.append(f"{name}: {problem}")
    return errors + _without_effect(given)


def forced_values() -> dict[str, Any]:
    """The fields we set ourselves, with their values, as far as the installed transformers has them."""
    return {name: rule.value for name, rule in RULES.items() if rule.kind == "set" and name in installed_fields()}


def accepts(annotation: str, value: Any) -> bool:
    """Whether `value` fits an annotation such as `dict | str | None` (numbers: no text, no NaN)."""
    return any(_fits(part.strip(), value) for part in annotation.split("|"))


def _fits(kind: str, value: Any) -> bool:
    if kind == "float":
        return is_number(value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in ("list[str]", "list[float]"):
        return isinstance(value, list) and all(_fits(kind[5:-1], item) for item in value)
    if kind == "Literal[False]":
        return value is False
    plain = {"bool": bool, "str": str, "None": type(None), "dict": dict}.get(kind.partition("[")[0])
    return plain is not None and isinstance(value, plain)


def field_problem(name: str, value: Any) -> str | None:
    """What is wrong with one field's value; None where nothing is."""
    try:
        rule = classify(name)
    except InputError as error:
        return str(error)
    shown = "a value" if name.endswith("token") else repr(getattr(value, "value", value))
    if rule.kind != "supported":
        if value in (rule.value, *rule.also):
            return None
        what = f"lorafocal sets it to {rule.value!r}" if rule.kind == "set" else "it is not supported"
        return f"found {shown}, but {what}: {rule.reason}"
    annotation = installed_fields().get(name)
    if annotation is None:
        return f"the installed transformers does not have this field{_nearest(name)}"
    least, limit = _WITHIN.get(name, (-math.inf, math.inf))
    if name in _WITHIN and type(value) in (int, float) and not least <= value < limit:
        return f"found {shown}; it must be at least {least} and {'finite' if limit == math.inf else f'below {limit}'}"
    if not accepts(annotation, value):
        example = ", such as 5.0e-6" if annotation == "float" else ""
        return f"found {shown} ({type(value).__name__}); it must be of type {annotation}{example}"
    if rule.choices and value not in rule.choices:
        return f"found {shown}; it must be one of {', '.join(rule.choices)}"
    if name == "save_steps" and value <= 0:
        return f"found {shown}; it must be above 0 (save_strategy no: nothing before the end)"
    if name == "num_train_epochs" and value <= 0:
        return f"found {shown}; it must be above 0, or nothing is trained"
    if name == "max_steps" and not (value > 0 or value == -1):
        return f"found {shown}; it must be above 0 (-1: as many as the epochs have)"
    if name == "optim" and value in _OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        return f"{shown} is of bitsandbytes, which is not installed: pip install 'lorafocal[quant]', or use adamw_torch"
    return _logger_problem(value) if name == "report_to" else None


def _logger_problem(value: str | list[str] | None) -> str | None:
    """Loggers nobody knows, and those whose package is missing: said before a model is loaded."""
    names = [value] if isinstance(value, str) else value or []
    for name in names:
        if name == "none" and len(names) == 1:
            continue
        if name not in LOGGERS:
            also = "; name each one: all would mean whatever is installed" if name == "all" else ""
            return f"found {name!r}; it must be none, or of {', '.join(LOGGERS)}{also}"
        packages = LOGGERS[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            return f"{name} is not installed: pip install {packages[0]}, or remove it; metrics.jsonl is always written"
    return None


def _without_effect(given: Mapping[str, Any]) -> list[str]:
    """Fields that another given field makes meaningless: an option that would be ignored is an error."""
    errors = []
    for name, (other, needed, default) in _NEEDS.items():
        if name in given and given.get(other, default) != needed:
            errors.append(f"{name}: it has no effect unless {other} is {needed}; set that, or remove {name}")
    errors += _of_the_schedule(given)
    if given.get("warmup_steps") and given.get("lr_scheduler_type") == "constant":
        errors.append(f"warmup_steps: {NO_WARMUP}")
    if given.get("optim") == "sgd":
        errors += [
            f"{name}: SGD has none; remove it" for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if name in given
        ]
    if given.get("eval_delay") and given.get("eval_strategy", "no") == "no":
        errors.append("eval_delay: nothing is evaluated, by eval_strategy no; set steps or epoch, or remove eval_delay")
    if not given.get("dataloader_num_workers"):
        errors += [
            f"{name}: there are no workers; set dataloader_num_workers, or remove {name}"
            for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor")
            if given.get(name)
        ]
    if given.get("max_steps", -1) != -1 and "num_train_epochs" in given:
        errors.append("num_train_epochs: max_steps is given too and decides alone; remove one of the two")
    return errors


def _of_the_schedule(given: Mapping[str, Any]) -> Iterator[str]:
    """What `lr_scheduler_kwargs` holds that the schedule does not take, or lacks."""
    named = given.get("lr_scheduler_type", "linear")
    schedule, settings = getattr(named, "value", named), given.get("lr_scheduler_kwargs") or {}
    if isinstance(settings, str) and (settings := object_in(text := settings)) is None:
        yield f"lr_scheduler_kwargs: {text!r} is no mapping; write key: value, or one JSON object as text"
    if schedule not in SCHEDULES or not isinstance(settings, Mapping):
        return
    takes = ", ".join(SCHEDULES[schedule]) or "nothing"
    if strange := [str(key) for key in settings if key not in SCHEDULES[schedule]]:
        yield f"lr_scheduler_kwargs: {schedule} takes {takes}; remove {', '.join(strange)}"
    needed = _NEEDED.get(schedule, ())
    found = [key for key in needed if settings.get(key) is not None]
    if needed and len(found) != 1:
        yield f"lr_scheduler_kwargs: {schedule} needs {' or '.join(needed)}{', not both' if found else ''}"


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, as transformers reads it; None where it would stay a text."""
    try:
        return json.loads(text) if text.startswith("{") else None
    except ValueError:
        return None


def _nearest(name: str) -> str:
    usable = [field for field, rule in RULES.items() if rule.kind == "supported" and field in installed_fields()]
    close = difflib.get_close_matches(name, usable, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
