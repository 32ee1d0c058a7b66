"""Open a saved adapter on the base it was trained on: which base, is it really that one, do all tensors
fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lorafocal.errors import InputError, first_line
from lorafocal.lineage import LINEAGE_FILE, Lineage, lineage_of
from lorafocal.model.adapters import LINEAR, features, widen_adapters, wrap
from lorafocal.model.base_config import config_sha256
from lorafocal.model.load import DTYPES, base_fingerprint, check_place, load_base, load_tokenizer
from lorafocal.model.quantized import dequantized_weight, prequantized, settle, to_dtype
from lorafocal.model.trained_modules import resolve_tokens
from lorafocal.objectives import OBJECTIVES
from lorafocal.run_folder import ADAPTER_CONFIG, CONFIG_FILE, MODEL_DIR, check_there, run_of
from lorafocal.tensor_files import PEFT_PREFIX, read_tensors
from lorafocal.yaml12 import parse_yaml

WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"  # of the training's tokenizer, as transformers calls it
MAX_LENGTH = 2048  # tokens of a preference row, where no run says otherwise

# The compatibility table's words for what can be opened: all of it is in the adapter's file, the base is as it was.
# A variant of a later PEFT has no word, so it is refused without being listed.
_OPENS = frozenset("lora rslora dora patterns modules_to_save trainable_tokens gaussian orthogonal random eva".split())


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter folder whose description was read and found usable; no weights are loaded yet.

    `base`, `revision`, `dtype` and `quantization` (a word of `model.quantized`, None for a float base) say what
    training saw; `tokenization` (settings of `tokenize_preferences`) and `beta` are the run's, where known.
    """

    folder: Path
    config: LoraConfig
    base: str
    revision: str | None
    dtype: str
    quantization: str | None
    lineage: Lineage | None
    tokenization: Mapping[str, Any]
    beta: float | None
    notes: tuple[str, ...]


def read_adapter(folder: Path, *, base: str | None = None) -> SavedAdapter:
    """Read an adapter folder and find its base.

    The base is, in this order: `base` (hub id or folder), `model.name` of the run's `config.yaml` beside the
    adapter folder, the hub id in `lorafocal.json`, `base_model_name_or_path` of the PEFT configuration. What it was
    quantised to in training, and its dtype: `model` of the run, else `lorafocal.json`, else what the base is stored as.

    Raises InputError: an adapter that cannot be opened, base unknown, or base other than the one the lineage names, by
    digest (row S13) or by quantisation.
    """
    config = read_lora_config(folder)
    lineage = lineage_of(folder)
    run = _run_settings(run_of(folder) / CONFIG_FILE)
    name, revision = _find_base(folder, base, run, lineage, config)
    base_config = read_config(name, revision)
    quantization = _quantization(folder, name, run, lineage, prequantized(base_config, name))
    return SavedAdapter(
        folder=folder,
        config=config,
        base=name,
        revision=revision,
        dtype=_dtype(run, lineage) or stored_dtype(base_config),
        quantization=quantization,
        lineage=lineage,
        tokenization=tokenization_of(folder),
        beta=reward_scale(lineage),
        notes=_check_base(folder, name, revision, lineage),
    )


def reward_scale(lineage: Lineage | None) -> float | None:
    """The beta of implicit rewards; None where the last objective has others or none: SimPO's beta is no such one."""
    if lineage is None or lineage.objective is None:
        return None
    entry = OBJECTIVES.get(lineage.objective["name"])
    return None if entry is not None and not entry.implicit_rewards else lineage.objective.get("beta")


def tokenization_of(folder: Path) -> dict[str, Any]:
    """How the run that left an adapter or a model in `folder` tokenised its pairs, as far as it lies there."""
    data = _run_settings(run_of(folder) / CONFIG_FILE).get("data", {})
    keys = ("max_length", "truncation", "max_prompt_length", "chat_template_kwargs")
    return {"max_length": MAX_LENGTH} | {key: data[key] for key in keys if data.get(key)}


def tokenizer_of(saved: SavedAdapter) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the chat template of the training where that lies beside the adapter."""
    tokenizer, own = load_tokenizer(saved.base, saved.revision), saved.folder / TEMPLATE_FILE
    if own.is_file():
        tokenizer.chat_template = own.read_text(encoding="utf-8")
    return tokenizer


def open_adapter(saved: SavedAdapter, *, dtype: str) -> PeftModel:
    """Load the base as training saw it (its weights quantised alike, and rounded to `saved.dtype`, also where they are
    de-quantised), compute in `dtype`, put the adapter on.

    Adapter tensors are float32. Strict both ways (row 53): a tensor without its layer, a layer without its
    tensor or another shape raises InputError naming it.
    """
    base = load_base(saved.base, revision=saved.revision, dtype=saved.dtype, quantization=saved.quantization)
    cast_parameters(base, getattr(torch, dtype))
    if dtype != saved.dtype:
        _multiply_as_trained(base, DTYPES[saved.dtype])
    return put_on(base, saved.folder, saved.config).eval()


def put_on(base: PreTrainedModel, folder: Path, config: LoraConfig, *, trainable: bool = False) -> PeftModel:
    """The adapter of `folder` on a loaded base, in float32, frozen unless `trainable`; strict both ways (row 53)."""
    start = {"init_lora_weights": True, "eva_config": None}  # its values are replaced at once
    plain = replace(config, base_model_name_or_path=None, inference_mode=not trainable, **start)
    try:
        resolve_tokens(base, plain.trainable_token_indices)  # PEFT would look for rows that the base may not have
        policy = widen_adapters(wrap(base, plain))
    except ValueError as error:
        raise InputError(f"{folder}: the adapter does not fit {type(base).__name__}: {error}") from error
    _check_places(folder, policy)
    exchange_adapter(policy, folder)
    return policy


def exchange_adapter(policy: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Give an `adapter` of `policy` the values of another one of its configuration, in place; strict (row 53)."""
    stored = read_tensors(folder / WEIGHTS_FILE)
    expected = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
    _check_tensors(folder / WEIGHTS_FILE, stored, expected)
    set_peft_model_state_dict(policy, stored, adapter_name=adapter)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters in place. Buffers stay: `model.to(bfloat16)` would round the rotary frequencies too.

    Weights in 4 or 8 bits stay too: what is multiplied by them is computed in `dtype` from then on.
    """
    to_dtype(model, dtype)
    settle(model)


def _multiply_as_trained(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have 4-bit layers multiply by what they were de-quantised to in training, in `dtype`, whatever computes now.

    bitsandbytes de-quantises to the dtype of the inputs: in float32 the base would be a finer one than was trained on.
    """
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
            layer.forward = partial(_linear, layer)


def _linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return torch.nn.functional.linear(inputs, dequantized_weight(layer).to(inputs.dtype), bias)


def _what_else(folder: Path) -> str:
    """Where to go from a folder that holds no adapter."""
    whole = next((place for place in (folder, folder / MODEL_DIR) if (place / "config.json").is_file()), None)
    if whole is None:
        return "A run keeps its own in RUN/adapter."
    return f"{whole} is a whole model: nothing is to be merged, and programs that take a model take it as it is."


def read_lora_config(folder: Path) -> LoraConfig:
    """The adapter's PEFT configuration. Raises InputError by the name of the variant where it cannot be opened."""
    path = folder / ADAPTER_CONFIG
    check_there(folder)
    if not path.is_file():
        raise InputError(f"{folder} is not an adapter folder: it has no {ADAPTER_CONFIG}. {_what_else(folder)}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS_FILE}; only safetensors are read: a pickle (.bin) may run code when it is"
            " opened. Save it again with a current PEFT, in a sandbox"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}. Copy it again from where it was trained.") from error
    kind = record.get("peft_type") if isinstance(record, dict) else None
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}; lorafocal opens LoRA adapters only.")
    known = {field.name for field in fields(LoraConfig)}
    if later := sorted(key for key, value in record.items() if key not in known and value):
        raise InputError(
            f"{path}: this PEFT does not know {', '.join(later)}. It was written by another PEFT; install that one to"
            " open it."
        )
    # What a later PEFT adds stands in every file that it writes, empty where an adapter does not use it.
    config = LoraConfig(**{key: value for key, value in record.items() if key in known})
    _check_opens(path, config)
    return config


def _check_opens(path: Path, config: LoraConfig) -> None:
    """Refuse what the folder holds one half of only, and what nothing here proves, by name."""
    strange = sorted(word.removeprefix("other:") for word in features(config) - _OPENS)
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _OPENS:
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, so the adapter fits a base that PEFT changed at the start, not"
            " the one it names. Use it with PEFT on that base, or convert it, where PEFT can, by its"
            " save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if strange:
        raise InputError(
            f"{path}: the adapter uses {', '.join(strange)}, which lorafocal does not open: use it as it is, with PEFT"
        )


def _run_settings(path: Path) -> dict[str, Any]:
    """The run's resolved `config.yaml`, or nothing where the adapter lies outside a run folder.

    Read leniently: the closed schema of another version must not stand between a user and a trained adapter.
    """
    if not path.is_file():
        return {}
    settings = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    ours = isinstance(settings, dict) and all(isinstance(settings.get(part), dict) for part in ("model", "data"))
    return settings if ours and isinstance(settings["model"].get("name"), str) else {}  # else of another program


def _find_base(
    folder: Path, base: str | None, run: Mapping[str, Any], lineage: Lineage | None, config: LoraConfig
) -> tuple[str, str | None]:
    recorded_revision = None if lineage is None else lineage.base.revision
    if base is not None:
        return base, None if Path(base).exists() else recorded_revision
    if run:
        return run["model"]["name"], run["model"].get("revision")
    if lineage is not None and "/" in lineage.base.name:
        return lineage.base.name, recorded_revision
    recorded = config.base_model_name_or_path
    if recorded and ("/" in recorded or Path(recorded).is_dir()):
        return recorded, config.revision
    raise InputError(
        f"{folder} was trained on a local base, {recorded or 'not named'}, whose place is not recorded. Say where it is"
        " with --base FOLDER."
    )


def read_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a hub id or folder; InputError where there is none."""
    check_place(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise InputError(
            f"no model can be read from {name} ({reason}). A base that lies elsewhere is named with --base."
        ) from error


def stored_dtype(config: PretrainedConfig) -> str:
    """bfloat16 where the model says so; otherwise float32, which holds every other stored dtype exactly."""
    stored = getattr(config, "dtype", None)
    return "bfloat16" if stored in (torch.bfloat16, "bfloat16") else "float32"


def _dtype(run: Mapping[str, Any], lineage: Lineage | None) -> str | None:
    """What the base was loaded in for training, where that is known and can be loaded."""
    trained = run.get("model", {}).get("dtype") or (None if lineage is None else lineage.dtype)
    return trained if trained in DTYPES else None


def _quantization(
    folder: Path, name: str, run: Mapping[str, Any], lineage: Lineage | None, stored: str | None
) -> str | None:
    """What the base was quantised to in training; `stored` is what the checkpoint `name` holds, None for floats."""
    configured = run.get("model", {}).get("quantization")
    recorded = None if lineage is None else lineage.quantization
    if lineage is None and configured is None:
        return stored
    if None not in (configured, recorded) and configured != recorded:
        raise InputError(
            f"{folder}: the run's config.yaml says that its base was {configured}, {LINEAGE_FILE} says {recorded}: one"
            " of the two is of another run. Restore it"
        )
    trained = configured or recorded
    if stored is not None and trained != stored:
        raise InputError(
            f"{folder} was trained on {held(trained)}, but {name} is stored as {stored}, which is another model. Name"
            " the one that it was trained on by --base"
        )
    return trained


def held(quantization: str | None) -> str:
    """How a base is held, for a person."""
    return "a float base" if quantization is None else f"a base quantised to {quantization}"


def _check_base(folder: Path, name: str, revision: str | None, lineage: Lineage | None) -> tuple[str, ...]:
    """Refuse a base whose weights are not those the adapter was trained on."""
    if lineage is None:
        return (
            f"The adapter has no {LINEAGE_FILE}: whether this is the base it was trained on, and whether that was"
            " quantised alike, is not known.",
        )
    check_same_base(folder, lineage, name, revision, remedy="Name the folder of those weights by --base")
    return ()


def check_same_base(folder: Path, lineage: Lineage, name: str, revision: str | None, *, remedy: str) -> None:
    """Refuse a base with other weights than the adapter was trained on, naming the stages that it lacks (rows 5, S13),
    and one whose config.json has them compute otherwise.

    `remedy` says how the right one is given.
    """
    found = base_fingerprint(name, revision=revision)
    if found["sha256"] == lineage.base.sha256:
        _check_same_config(folder, lineage, name, revision)
        return
    trained_on = f"{folder} was trained on {lineage.base.name} (weights sha256 {lineage.base.sha256})"
    given = base_lineage(name, revision)
    there = {stage.sha256 for stage in given.parents} if given else set()
    missing = [str(stage) for stage in lineage.merged if stage.sha256 not in there]
    if missing:
        raise InputError(
            f"{trained_on}, which is {lineage.first_base.name} with {', then '.join(map(str, lineage.merged))} merged"
            f" in, but {name} (sha256 {found['sha256']}) lacks {', '.join(missing)}: merge that first"
            f" (`lorafocal merge`), in the same dtype as then. {remedy}"
        )
    raise InputError(f"{trained_on}, but {name} has sha256 {found['sha256']}. {remedy}")


def _check_same_config(folder: Path, lineage: Lineage, name: str, revision: str | None) -> None:
    if lineage.base_config_sha256 not in (None, config_sha256(read_config(name, revision))):
        raise InputError(
            f"{name}: the base's config.json is not the one of training. The weights are those that {folder} was"
            " trained on, but they compute otherwise by it (the rotations, a norm's epsilon, a shape): restore it, or"
            " download the base again"
        )


def base_lineage(name: str, revision: str | None = None) -> Lineage | None:
    """The lineage of a base that is itself a merged model, in a folder or on a hub; None for any other."""
    file = cached_file(
        name,
        LINEAGE_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else lineage_of(Path(file).parent)


def lora_layers(policy: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers, named as the base names them."""
    return {n.removeprefix(PEFT_PREFIX): m for n, m in policy.named_modules() if isinstance(m, LoraLayer)}


def _check_places(folder: Path, policy: PeftModel) -> None:
    """Refuse an adapter on the output head or the embeddings: tied, they are one tensor, and a merge changes
    both."""
    model = policy.get_base_model()
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, layer in lora_layers(policy).items():
        if id(layer) in outer or not isinstance(layer.get_base_layer(), LINEAR):
            raise InputError(
                f"{folder}: the adapter changes {name}, which is not an inner linear layer, and no other is opened"
                " here. Use the adapter as it is, with PEFT"
            )


def _check_tensors(path: Path, stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    wrong = [f"{name} has no layer in the base" for name in sorted(stored.keys() - expected.keys())]
    wrong += [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        if stored[name].shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(stored[name].shape)}, the base needs {tuple(expected[name].shape)}")
        elif not stored[name].isfinite().all():
            wrong.append(f"{name} has values that are not finite")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{path} does not fit the base: {'; '.join(wrong[:3])}{more}. The file is incomplete or of another base."
        )
