"""Loads bases and tokenizers: safetensors only, no remote code, on one device, in the dtype that was asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import tokenization_auto
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from lorafocal import launch
from lorafocal.errors import InputError, first_line, ran_out
from lorafocal.model.quantized import bitsandbytes_config, check_loaded, library, prequantized, settle, to_dtype
from lorafocal.publish import public_name, sha256
from lorafocal.run_folder import ADAPTER_CONFIG, ADAPTER_DIR, MANIFEST_FILE, MODEL_DIR
from lorafocal.tensor_files import dtype_word

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SCALES = re.compile(r"(SCB|absmax|scales?|scale_inv)$")  # what quantised weights are multiplied by, in their files
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Whether mistral-common (which comes with vLLM) is installed does not decide how a Mistral's text is cut.
_BY_TRANSFORMERS = {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}
_SHARD = re.compile(r"(?!\.)[A-Za-z0-9._-]+\.safetensors")  # a bare name: no folder, no link up, no pickle


def check_place(name: str) -> None:
    """Refuse what can only be a folder and is none, or is another of a run's: nothing is asked of a hub for it.

    Raises InputError.
    """
    folder = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.exists():
        raise InputError(f"{name}: there is no such folder, and a hub id has the form owner/model")
    if (folder / "config.json").is_file():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{name} holds an adapter, and no model: training goes on from it by adapter.start_from, and `lorafocal"
            " merge` makes a model of it"
        )
    if (folder / "trainer_state.json").is_file():
        raise InputError(f"{name} is a checkpoint, for --resume alone: a finished run's model is beside it, in model")
    if (folder / MANIFEST_FILE).is_file():
        made = MODEL_DIR if (folder / MODEL_DIR).is_dir() else ADAPTER_DIR
        raise InputError(f"{name} is a run folder; its {made} is {folder / made}")


def load_tokenizer(name: str, revision: str | None = None, *, key: str = "model.name") -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder. Raises InputError where there is none, at the config's `key`."""
    check_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **_BY_TRANSFORMERS)
    except (OSError, ValueError, ImportError, RecursionError) as error:
        raise InputError(f"{key}: {_not_found('tokenizer', name, error)}") from error
    check_tokenizer(tokenizer, key)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises InputError for a Mistral's tokenizer as mistral-common has it: its chat template is code, not text."""
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise InputError(
            f"{key}: this tokenizer was loaded through mistral-common, which shows no chat template and no special"
            " tokens: load it by `AutoTokenizer.from_pretrained(folder, mistral_format=False)`; where transformers does"
            " not know that, update it, or uninstall mistral-common"
        )


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "bfloat16",
    shape: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A frozen base in train mode on `device`, or on the local one (the GPU of this rank where there is one).

    `quantization` is one of `compatibility.QUANTIZED`; a checkpoint that is quantised already is loaded as it is.
    Raises InputError for an unknown dtype (fp16 among them), a base that is missing, pickled, quantised otherwise, no
    causal model, needs remote code or has other values than `shape` (a config's `model.shape`) states, for one whose
    index leads out of its folder, before anything there is read, and for one that carries an adapter.
    """
    dtype = dtype_word(dtype) if isinstance(dtype, torch.dtype) else dtype
    if dtype not in DTYPES:
        raise InputError(
            f"model.dtype: {dtype!r} is not supported; choose {' or '.join(DTYPES)}"
            " (float16 overflows in preference losses: use bfloat16)"
        )
    check_place(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        check_shape(config, shape or {})
        weight_names(name, revision)
        stored = prequantized(config, name)
        device = device or local_device()
        plan = planned(quantization, stored, name, device)
        how = {} if plan == stored else {"quantization_config": bitsandbytes_config(str(plan), DTYPES[dtype])}
        # Its attention is transformers' default: SDPA, or eager where a model has none (Gemma-2).
        model, report = door(config, name).from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
            **how,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RecursionError) as error:
        raise InputError(f"model.name: {_not_found('model', name, error)}") from error
    except (RuntimeError, AttributeError) as error:  # what transformers raises over tensors that do not fit
        if ran_out(error):
            raise
        raise InputError(f"model.name: the weights of {name} do not fit its config ({first_line(error)})") from error
    _check_complete(report, name)
    model.config._commit_hash = commit_of(name, revision)  # as older versions of transformers said; it is not saved
    if stored is not None:
        to_dtype(model, DTYPES[dtype])
    model.requires_grad_(False)
    model.config.get_text_config().use_cache = False
    settle(model)
    check_loaded(model, quantization=plan, dtype=DTYPES[dtype])
    return model.train()


def _check_complete(report: Mapping[str, Any], name: str) -> None:
    """Refuse weights that would be made up, and scales that nobody reads: transformers says both in a warning."""
    missing = sorted(report["missing_keys"])
    scales = sorted(key for key in report["unexpected_keys"] if _SCALES.search(key))
    if missing:
        raise InputError(
            f"model.name: {name} lacks {len(missing)} tensors of its model (first: {missing[0]}), which would be random"
            " numbers: download it again, or save it again with `save_pretrained`"
        )
    if scales:
        raise InputError(
            f"model.name: {name} holds quantised weights ({scales[0]}), but its config does not say so: use the config"
            " that belongs to them, or the float original"
        )


def planned(quantization: str | None, stored: str | None, name: str, device: torch.device | None = None) -> str | None:
    """How a base is to be held: as asked for, or as its checkpoint is stored.

    Raises InputError where the two differ, and where bitsandbytes is needed and does not work on `device`.
    """
    if stored is not None and quantization not in (None, stored):
        raise InputError(
            f"model.quantization is {quantization}, but {name} is stored as {stored}: leave `model.quantization` out,"
            " or use its float original"
        )
    plan = quantization or stored
    if plan is not None:
        library(device or local_device())
    return plan


def door(config: PreTrainedConfig, name: str) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The loader of causal models, or that of image-text models, whose text part is one.

    Raises InputError for any other kind of model.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise InputError(
        f"model.name: {name} is of the type {config.model_type!r}, which does not continue text: use a causal language"
        " model"
    )


def loader_of(config: PreTrainedConfig) -> str:
    """The class by which anybody loads such a model; that of causal models for what transformers does not know."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    with_images = not known and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (AutoModelForImageTextToText if with_images else AutoModelForCausalLM).__name__


def local_device() -> torch.device:
    """The accelerator of this process, also before it has joined the others; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.world_size() == 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", launch.local_rank() % torch.cuda.device_count())  # as accelerate chooses it


def check_shape(config: object, shape: Mapping[str, Any]) -> None:
    """Raises InputError naming every value of `shape` that the loaded config has otherwise."""
    missing = object()
    wrong = [
        f"{key} is {getattr(config, key, None)!r}, the config file states {value!r}"
        for key, value in shape.items()
        if not _same(getattr(config, key, missing), value)
    ]
    if wrong:
        raise InputError(f"model.shape does not match the loaded model: {'; '.join(wrong)}. Correct one of the two")


def _same(found: object, stated: object) -> bool:
    """Equal, where a stated mapping (rope parameters) may leave out what the loaded one derives."""
    if isinstance(found, Mapping) and isinstance(stated, Mapping):
        return all(key in found and _same(found[key], value) for key, value in stated.items())
    return found == stated


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings; nothing is ever resized here."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings: ids from {rows} on would fail."
            " Resize and train the base's embeddings before preference tuning, or use the base's own tokenizer"
        )


def check_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, other: str) -> None:
    """Refuse to give our token ids to the model `other`, whose tokenizer reads some of them as another text.

    Equal sizes prove nothing: Llama 2 and Mistral both have 32000 tokens. Raises InputError.
    """
    known = theirs.get_vocab()
    strange = [(number, token) for token, number in ours.get_vocab().items() if known.get(token) != number]
    if strange:
        number, token = min(strange)
        raise InputError(
            f"{other} does not share the tokenizer: {len(strange)} tokens have another id there or none (first:"
            f" {token!r}, {number} here), so its log-probs would be of other text. Give a reference of the same family"
        )


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hexadecimal sha256 of the chat template and of the vocabulary, tokens with their ids, by the manifest's keys."""
    said = {"chat_template": tokenizer.chat_template or "", "vocabulary": sorted(tokenizer.get_vocab().items())}
    return {f"{name}_sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in said.items()}


def check_length(model: PreTrainedModel, longest: int) -> None:
    """Refuse sequences of `longest` tokens where a model has no positions that far, or other ones for all of a batch.

    Rotations of the kinds "longrope" (Phi-3) and "dynamic" change for every sequence in a batch as soon as one of them
    passes a length: a pair's score would depend on its neighbours. Raises InputError.
    """
    config = model.config.get_text_config()
    learned = any(name.endswith(("wpe", "embed_positions", "position_embeddings")) for name, _ in model.named_modules())
    positions = getattr(config, "max_position_embeddings", None)  # RecurrentGemma has no limit
    if learned and positions is not None and longest > positions:
        _refuse_length(longest, f"the model has positions for {positions}")
    for rope in _rotations(config):
        kind = rope.get("rope_type")
        limit = rope.get("original_max_position_embeddings") or positions
        if kind in ("longrope", "dynamic") and limit is not None and longest > limit:
            _refuse_length(longest, f"beyond {limit} the model's {kind} rotations change for all pairs of a batch")


def _rotations(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The rope parameters of a config: one set, or one a layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, Mapping)]


def _refuse_length(longest: int, why: str) -> NoReturn:
    raise InputError(f"data.max_length: the longest pair has {longest} tokens, and {why}. Lower `data.max_length`")


def base_fingerprint(name: str, *, revision: str | None = None) -> dict[str, str | None]:
    """Identity of a base: `name` (hub id, or a local folder's last name), `revision` (commit), `sha256` of its weights.

    The digest is over the names and digests of the safetensors files, so one flipped byte changes it.
    """
    files = weight_files(name, revision)
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name} {stated_sha256(file) or sha256(file)}\n".encode())
    return {
        "name": public_name(name),
        "revision": commit_of(name, revision),
        "sha256": digest.hexdigest(),
    }


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a hub's model as it lies in the cache; None for a local folder."""
    if Path(name).exists():
        return None
    return extract_commit_hash(str(file_of(name, "config.json", revision)), None) or revision


def weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model, on this machine. Raises InputError as `weight_names`, and where one lacks."""
    files = {file: file_of(name, file, revision) for file in weight_names(name, revision)}
    if absent := [file for file, path in files.items() if path is None]:
        raise InputError(f"{name} lacks {absent[0]}, which its index names: download it again")
    return [path for path in files.values() if path is not None]


def weight_names(name: str, revision: str | None) -> list[str]:
    """The names of a model's safetensors files: one, or those its index names.

    Raises InputError where there is none (pickles are never read: they may run code), and where the index names
    anything but safetensors files beside itself: transformers follows it out of the folder. An adapter in the same
    place is refused too.
    """
    _check_no_adapter(name, revision)
    _check_usual_names(name, revision)
    if file_of(name, "model.safetensors", revision) is not None:
        return ["model.safetensors"]
    index = file_of(name, "model.safetensors.index.json", revision)
    if index is None:
        raise InputError(
            f"{name} has no safetensors weights, and no others are read: a pickle (.bin, .pt) may run code when it is"
            " opened. Look for the same model in safetensors, or convert it in a sandbox (a container without network"
            " and without your files) by `AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)`"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [shard for shard in shards if not _SHARD.fullmatch(shard)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}: {index.name} is no index of safetensors files ({error}): download it again"
        ) from error
    if outside:
        raise InputError(
            f"{name}: its weight index points outside its folder, or at something else than safetensors"
            f" ({outside[0]!r}); do not use this model"
        )
    return shards


def _check_no_adapter(name: str, revision: str | None) -> None:
    """Refuse a base with an adapter in its folder (row 52): transformers would load both, and call that the base."""
    if file_of(name, ADAPTER_CONFIG, revision) is not None:
        raise InputError(
            f"{name} holds a model and an adapter (adapter_config.json) in one place, so that it is not clear which is"
            " meant: move the adapter's files into a folder of their own"
        )


def _check_usual_names(name: str, revision: str | None) -> None:
    """Refuse a config that names the file of its weights: transformers would load that one, whatever kind it is."""
    config = file_of(name, "config.json", revision)
    stated = None if config is None else json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    if stated is not None:
        raise InputError(
            f"{name}: its config.json has transformers load {stated!r} in the place of model.safetensors, which is what"
            " is checked here: take `transformers_weights` out of it, and call that file model.safetensors"
        )


def file_of(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder or of a hub's model, downloaded if need be; None where there is none of that name."""
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def stated_sha256(file: Path) -> str | None:
    """A file in a hub's cache is a link to a blob that is named by its own sha256; None of any other file."""
    blob = file.resolve().name
    return blob if file.is_symlink() and _SHA256.fullmatch(blob) else None


def _not_found(what: str, name: str, error: Exception) -> str:
    give = "Install the package that it needs, or give" if isinstance(error, ImportError) else "Give"
    return (
        f"no {what} could be loaded from {name!r} ({first_line(error)}). {give} a hub id that you have"
        " access to, or a folder written by `save_pretrained` (safetensors, no remote code)"
    )
