"""Bases through unsloth's `FastLanguageModel`: its backbone in one model; head, adapters and trainer stay our own.

unsloth changes classes of transformers, PEFT and the trainer for a whole process. Here the forwards of its backbone
(layers, attention, rotations, norms) are bound to the one model that was loaded, and the classes become what they were:

- the causal model's own forward, because unsloth's rounds whatever the head returns to the base's dtype: log-probs
  would keep 8 bits;
- PEFT's and `transformers.Trainer`'s: the same trainer, and any other model of the process as it always is.

Adapters are attached by `attach_lora` as everywhere. `get_peft_model` knows neither trained tokens nor our starts,
seeds otherwise, and its fused functions pass over what `model.fused` tries before it installs. Its attention does not
call transformers' attention interface, so the probes choose padded rows. Read from unsloth 2026.10.7: docs/unsloth.md.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from lorafocal import launch
from lorafocal.errors import InputError, first_line, ran_out

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # with forwards by hand, and embeddings that nothing is done to
ROTATIONS = ("default", "llama3")  # that unsloth computes as transformers does
PROBED = 64  # tokens that the probes of a layout need room for
CODE_FOLDER = "UNSLOTH_COMPILE_LOCATION"  # where it writes Python files that it imports again
SETTINGS = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # no download that only counts users
    "UNSLOTH_MEGA_CACHE": "0",  # no pickled compiler artifacts of other runs
    "UNSLOTH_BNB_NF4_LINEAR": "0",  # bitsandbytes' own product with 4-bit weights
    "UNSLOTH_FAST_GRAD_PARAMS": "0",  # torch's own clipping and zeroing of gradients
    "UNSLOTH_FUSED_FORWARD": "0",  # transformers' own forward of the causal model, not a rewritten one
}
NO_CPU = {"UNSLOTH_DISABLE_CPU_FALLBACK": "1", "UNSLOTH_FORCE_CPU": "0"}
"""From 2026.10.9 on: without a GPU it is transformers' model by another name, and trainers get other defaults."""
_CHANGED = ("transformers", "peft", "trl")  # what it changes while it is imported
_OF_PYTHON = ("__annotations__", "__annotations_cache__", "__annotate_func__", "__warningregistry__")
_ELSEWHERE = "Use `model.backend: transformers`"
_folders: set[str] = set()

Found = Mapping[Any, Mapping[str, Any]]
"""Classes and modules, and the attributes that each had."""


def start() -> ModuleType:
    """unsloth, imported with a private folder for the code that it writes; a second call imports nothing.

    Raises InputError where unsloth is missing or finds no GPU, and where it comes too late: imported before with its
    folder in the working directory, or after a library that it changes.
    """
    if sys.modules.get("unsloth") is not None:
        if os.environ.get(CODE_FOLDER) not in _folders:
            _too_late("it was imported before, and takes code from the working directory")
        return sys.modules["unsloth"]
    if importlib.util.find_spec("unsloth") is None:
        raise InputError(
            "model.backend: unsloth is not installed. It needs older libraries than the tested ones, and so an"
            " environment of its own: `pip install . -r requirements/unsloth.txt` there (docs/unsloth.md)."
            f" {_ELSEWHERE}"
        )
    if early := [name for name in _CHANGED if name in sys.modules]:
        _too_late(f"{', '.join(early)} came before it, which it changes while they are imported")
    os.environ.update(SETTINGS | NO_CPU | {CODE_FOLDER: _private_folder()})
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        raise InputError(
            f"model.backend: unsloth does not start here ({_said(error)}). It needs a CUDA device and the versions of"
            f" requirements/unsloth.txt. {_ELSEWHERE}"
        ) from error


def _private_folder() -> str:
    """A new folder that only this user can read and write, so that nobody has put code there; gone at the end."""
    folder = tempfile.mkdtemp(prefix="lorafocal-unsloth-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _folders.add(folder)
    return folder


def _too_late(why: str) -> NoReturn:
    raise InputError(
        f"model.backend: unsloth must be imported first, and by lorafocal: {why}. Run `lorafocal train`, or begin the"
        " program with `from lorafocal.model.backends import unsloth` and `unsloth.start()`"
    )


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    max_length: int,
    shape: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen base in train mode as `model.load.load_base` gives it, with unsloth's backbone, and its tokenizer.

    `max_length` is the most tokens that a row will have. The tokenizer is the base's own: unsloth's has another padding
    side, and may have a token more. Raises InputError for what `start`, `load_base` and `check_supported` refuse.
    """
    unsloth = start()
    from peft import PeftModelForCausalLM
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Trainer

    from lorafocal.model.load import DTYPES, load_tokenizer, local_device, weight_files
    from lorafocal.model.quantized import check_loaded, settle

    tokenizer = load_tokenizer(name, revision)
    config, plan, how = _planned(name, revision, dtype, quantization, max_length, shape or {})
    room = min(config.max_position_embeddings, max(max_length, PROBED))
    weight_files(name, revision)  # safetensors, none of them outside the model's folder
    code = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    classes = [value for value in vars(code).values() if isinstance(value, type) and value.__module__ == code.__name__]
    with left_as_found(code, *classes, PeftModelForCausalLM, Trainer) as found:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                model, _ = unsloth.FastLanguageModel.from_pretrained(
                    model_name=name,
                    revision=revision,
                    use_exact_model_name=True,  # never a quantised copy of another place
                    max_seq_length=room,
                    dtype=DTYPES[dtype],
                    load_in_4bit=False,  # `quantization_config` says how, or the checkpoint does
                    device_map={"": local_device()},
                    offload_embedding=False,
                    fix_tokenizer=False,
                    use_gradient_checkpointing=False,  # `training.activation_checkpointing` is transformers' own
                    use_safetensors=True,
                    **how,
                )
        except (OSError, ValueError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
            if ran_out(error):
                raise
            raise InputError(f"model.backend: unsloth does not load {name} ({_said(error)}). {_ELSEWHERE}") from error
        keep_forwards(model, found)
    restore_embeddings(model, name, revision)
    check_rotations(model, classes)
    model.requires_grad_(False)
    model.config.use_cache = False
    settle(model)
    check_loaded(model, quantization=plan, dtype=DTYPES[dtype])
    refuse_what_it_would_do(model, room)
    return model.train(), tokenizer


def _planned(
    name: str, revision: str | None, dtype: str, quantization: str | None, max_length: int, shape: Mapping[str, Any]
) -> tuple[PreTrainedConfig, str | None, dict[str, Any]]:
    """The base's config, how it is to be held, and what says so to the loader. Raises InputError."""
    from transformers import AutoConfig

    from lorafocal.model.load import DTYPES, check_shape, planned
    from lorafocal.model.quantized import bitsandbytes_config, prequantized

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model.name: {name} has no config that transformers knows ({_said(error)})") from error
    check_shape(config, shape)
    stored = prequantized(config, name)
    plan = planned(quantization, stored, name)
    check_supported(config, name, dtype=dtype, quantization=plan, max_length=max_length)
    how = {} if plan == stored else {"quantization_config": bitsandbytes_config(str(plan), DTYPES[dtype])}
    return config, plan, how


def check_supported(
    config: PreTrainedConfig, name: str, *, dtype: str, quantization: str | None, max_length: int
) -> None:
    """Refuse by name what unsloth would compute otherwise than this project. Raises InputError."""
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    refusals = {
        f"model.dtype is {dtype}, and unsloth's attention may compute in bfloat16 all the same": dtype != "bfloat16",
        "model.quantization is int8, for which unsloth rewrites a model's code": quantization == "int8",
        f"{name} is of the type {config.model_type!r}, and this backend is for {', '.join(FAMILIES)}": (
            config.model_type not in FAMILIES
        ),
        f"{name} has rotations of the kind {rotation!r}, and this backend knows {' and '.join(ROTATIONS)}": (
            rotation not in ROTATIONS
        ),
        f"{name} has a dropout in its attention, of which unsloth's knows nothing": (
            getattr(config, "attention_dropout", 0.0) > 0
        ),
        "this launch has several processes, in which this backend was never tried": launch.world_size() > 1,
    }
    for reason, applies in refusals.items():
        if applies:
            raise InputError(f"model.backend: {reason}. {_ELSEWHERE}")
    if max_length > config.max_position_embeddings:
        raise InputError(
            f"data.max_length: {max_length} tokens, and {name} has {config.max_position_embeddings} positions, which"
            f" unsloth would stretch without a word. Lower `data.max_length`"
        )


@contextlib.contextmanager
def left_as_found(*owners: Any) -> Iterator[Found]:
    """Within, classes and modules may be changed; afterwards each has the attributes that it had before."""
    found = {owner: dict(vars(owner)) for owner in owners}
    try:
        yield found
    finally:
        for owner, before in found.items():
            for added in vars(owner).keys() - before.keys() - {*_OF_PYTHON}:
                delattr(owner, added)
            for key, value in before.items():
                if vars(owner).get(key) is not value:
                    setattr(owner, key, value)


def keep_forwards(model: nn.Module, found: Found) -> None:
    """Bind to the modules within `model` the forwards that their classes have got since they were `found`."""
    for module in model.modules():
        kind = type(module)
        forward = vars(kind).get("forward")
        if module is not model and kind in found and forward is not found[kind].get("forward"):
            module.forward = MethodType(kind.forward, module)


def restore_embeddings(model: Any, name: str, revision: str | None) -> None:
    """Give the embeddings the values that are stored: unsloth zeroes the pad token's. Raises InputError."""
    from safetensors import safe_open

    from lorafocal.model.load import weight_files

    weight = model.get_input_embeddings().weight
    key = next(key for key, parameter in model.named_parameters() if parameter is weight)
    for file in weight_files(name, revision):
        with safe_open(file, framework="pt") as stored:
            if key in stored.keys() and stored.get_slice(key).get_shape() == list(weight.shape):
                weight.data.copy_(stored.get_tensor(key))
                return
    raise InputError(
        f"model.backend: unsloth made embeddings of the shape {tuple(weight.shape)} of {name}, which its files do not"
        f" hold: it adds a pad token where a tokenizer has none. Save the base with one that does, or: {_ELSEWHERE}"
    )


def check_rotations(model: Any, classes: Iterable[type]) -> None:
    """Hold the frequencies of unsloth's rotations against those of the family's own class, one of `classes`.

    transformers makes models without memory at first, and fills in what it knows by its classes' names: in an
    exchanged one, frequencies may be left as whatever was there. Raises InputError.
    """
    import torch

    [own] = [kind for kind in classes if kind.__name__.endswith("RotaryEmbedding")]
    wanted = own(config=model.config).inv_freq
    held = getattr(model.get_decoder().rotary_emb, "inv_freq", None)
    if held is None or not torch.allclose(held.float().cpu(), wanted.float().cpu(), rtol=1e-3):
        raise InputError(
            f"model.backend: unsloth's rotations of {type(model).__name__} have other frequencies than transformers':"
            f" its positions would be wrong, without a word. {_ELSEWHERE}"
        )


def refuse_what_it_would_do(model: Any, room: int) -> None:
    """Have `model` refuse longer rows, which unsloth cuts, and to generate: its backbone knows no transformers cache.

    The attribute `backend` says to others whose backbone it is.
    """

    def whole(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if (length := kwargs["input_ids"].shape[1]) > room:
            raise InputError(f"a row has {length} tokens, and unsloth was loaded for {room} and would cut it")

    def generate(*args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(
            "a model with unsloth's backbone does not generate here: save its adapter, and use `lorafocal chat` or"
            " `lorafocal generate`, which load the base through transformers"
        )

    model.get_decoder().register_forward_pre_hook(whole, with_kwargs=True)
    model.generate = generate
    model.backend = "unsloth"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
