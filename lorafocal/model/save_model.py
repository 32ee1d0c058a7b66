"""Writes a whole trained model as others load it: safetensors under the names of its base, and what lies beside them.

One parameter is whole at a time, and a file's worth of them in memory.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafocal import launch
from lorafocal.card import CARD_FILE, model_card
from lorafocal.lineage import FULL, Lineage
from lorafocal.model.continued import place_of
from lorafocal.model.load import base_fingerprint, file_of, loader_of
from lorafocal.model.local_places import GENERATION_CONFIG, forget_places
from lorafocal.model.saved import read_config
from lorafocal.shard_files import StoredTensors, write_shards
from lorafocal.tensor_files import dtype_word

MAX_SHARD_BYTES = 5_000_000_000  # what transformers writes
WEIGHTS, INDEX = "model", "model.safetensors.index.json"

# What makes tokens of images stays the base's; without it a merged image-text model would see none.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

_LAYER = re.compile(r"(.*?\.\d+)\.")  # up to the first number in a name


def write_weights(
    folder: Path,
    model: PreTrainedModel,
    whole: Callable[[Parameter], Tensor],
    *,
    dtype: torch.dtype,
    most: int = MAX_SHARD_BYTES,
) -> None:
    """Collective: `model.safetensors`, or files of at most `most` bytes and their index, written by rank 0.

    `whole` gives a parameter's whole value on the CPU of every rank. Tied weights are written once, floating ones in
    `dtype`, but for those that transformers keeps in fp32. Raises InputError as `write_shards`.
    """
    tensors = _in_dtype(as_stored(model, _whole_state(model, whole)), model, dtype)
    files = write_shards(folder, WEIGHTS, tensors, rank=0 if launch.is_main() else -1, world=1, most=most)
    if launch.is_main() and len(files) > 1:
        _number(files)


def _whole_state(model: PreTrainedModel, whole: Callable[[Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, and every buffer that is saved, in the order of the model's layers."""
    parameters = dict(model.named_parameters())
    seen = {id(parameter) for parameter in parameters.values()}
    ignored = model._keys_to_ignore_on_save or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in ignored:
            continue
        if name in parameters:
            yield name, whole(parameters[name])
        elif id(tensor) not in seen:
            yield name, tensor.detach().cpu()


def as_stored(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as files of this architecture hold them: newer transformers hold experts as one, for instance.

    Layer by layer: no such change reaches over several.
    """
    for _, layer in groupby(tensors, key=lambda item: _layer_of(item[0])):
        yield from _reverted(model, dict(layer)).items()


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[1] if found else name


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _in_dtype(
    tensors: Iterable[tuple[str, Tensor]], model: PreTrainedModel, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Copies: parts of one tensor share its memory, and a file holds no such."""
    wide = (*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
    for name, tensor in tensors:
        keeps = not tensor.is_floating_point() or any(part in name for part in wide)
        yield name, tensor.to(tensor.dtype if keeps else dtype, copy=True)


def _number(files: list[Path]) -> None:
    """Give the files the names that transformers looks for, and an index."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        named = file.with_name(f"{WEIGHTS}-{number:05d}-of-{len(files):05d}.safetensors")
        stored = StoredTensors([file])
        weight_map |= dict.fromkeys(stored, named.name)
        total += sum(tensor.nbytes for tensor in stored.values())
        file.replace(named)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (files[0].parent / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_papers(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    lineage: Lineage | None,
    results: Mapping[str, float] | None = None,
    *,
    dtype: torch.dtype,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Beside the weights in `folder`: config and generation settings as the base has them, but for places of a machine
    under keys that transformers does not know; tokenizer, lineage, card.

    `results` and `run`, the run's manifest, are for the card. The training itself becomes the last stage of the
    lineage, under the digest of the weights that it made. Without a
    lineage (a base from nowhere) there is no card either.
    """
    name, revision = place_of(model)
    config = copy.deepcopy(model.config) if name is None else read_config(name, revision)
    config.dtype = dtype_word(dtype)
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(folder)
    if name is not None:
        copy_of_base((GENERATION_CONFIG, *PROCESSORS), name, revision, folder)
    forget_places(folder, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if lineage is not None:
        weights = base_fingerprint(str(folder))["sha256"]
        stage = lineage.stage(WEIGHTS, str(weights), FULL)
        made = replace(lineage, parents=(*lineage.parents, stage))
        made.write(folder)
        card = model_card(made, results, dtype=config.dtype, loader=loader_of(config), run=run)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def copy_of_base(files: Iterable[str], name: str, revision: str | None, folder: Path) -> None:
    """Those of `files` that the base `name` has, into `folder` as they stand there."""
    for file in files:
        if (found := file_of(name, file, revision)) is not None:
            shutil.copyfile(found, folder / file)
