"""The weights of a merged model: its base gone through tensor by tensor, each changed, rounded once and written.

At most a few tensors are in memory at a time, beside the adapter. A base whose stored tensors are not those of its
model (fused experts, weights in 4 bits, other names) is merged whole, in memory, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.model.local_places import GENERATION_CONFIG, forget_places
from lorafocal.model.save_model import copy_of_base
from lorafocal.model.saved import SavedAdapter, cast_parameters, read_config
from lorafocal.model.trained_modules import is_tied
from lorafocal.release.deltas import Change, changes
from lorafocal.release.dequantize import dequantize
from lorafocal.release.rounding import DTYPES, rounded, rounded_change
from lorafocal.release.shards import Checkpoint, ShardWriter, Stored
from lorafocal.release.skeleton import Skeleton, skeleton
from lorafocal.release.survival import LayerSurvival
from lorafocal.release.whole import fold


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: what each changed tensor kept, whether output head and embeddings are one tensor, and notes."""

    survival: tuple[LayerSurvival, ...]
    tied: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """The weights that are merged into: a place, the dtype they are rounded to first, the few bits after that."""

    name: str
    revision: str | None
    dtype: str
    quantization: str | None


@torch.no_grad()
def write_merged(
    saved: SavedAdapter, folder: Path, *, onto: str = "trained", original: str | None = None, dtype: str
) -> Written:
    """Write the weights and configuration of the merged model into the empty `folder`, in `dtype`.

    `onto` "trained": the base as training saw it, rounded to the dtype of training and, of a quantised one, to few bits
    and back, bit for bit as loading does it. "original": the floats as they are stored, of `original` (a hub id or
    folder) or of the base itself. All arithmetic is in float32, with one cast at the end.

    The caller has opened the adapter (`open_adapter`), which finds layers that its file lacks.
    Raises InputError, by the tensor's name: a change that no tensor of the base takes, one of tied embeddings that
    would change the output head too or the reverse (row 45), a value that is too large for float16.
    """
    source = _source(saved, onto, original)
    outline = skeleton(source.name, source.revision, dtype=source.dtype, quantization=source.quantization)
    if outline.stored is not None and source.quantization is None:
        raise InputError(f"{source.name} is stored as {outline.stored}, which is no float original: name that one")
    checkpoint = Checkpoint.open(source.name, source.revision)
    why = outline.obstacle(checkpoint)
    if why is None and (copies := _unequal_copies(outline, checkpoint)):
        why = f"its {copies} are tied in its configuration and differ"
    if why is None:
        return _by_tensor(saved, source, outline, checkpoint, folder, DTYPES[dtype])
    note = f"The base was merged whole, in memory, not tensor by tensor: {why}."
    return _whole(saved, source, folder, DTYPES[dtype], note)


def _source(saved: SavedAdapter, onto: str, original: str | None) -> Source:
    if onto == "trained":
        return Source(saved.base, saved.revision, saved.dtype, saved.quantization)
    if onto != "original":
        raise InputError(f"--onto {onto!r}: a merge is written onto the trained or the original base")
    revision = saved.revision if original is None else None
    return Source(original or saved.base, revision, "float32", None)  # float32 holds what others store


def _by_tensor(
    saved: SavedAdapter, source: Source, outline: Skeleton, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype
) -> Written:
    learned = changes(saved, outline.transposed)
    check_places(saved, learned, outline.places)
    learned = {outline.places[name]: change for name, change in learned.items()}
    sources = _sources(outline, checkpoint)
    plan = _plan(outline, checkpoint, sources, dtype)
    survival = []
    with ShardWriter(folder, plan) as out:
        for name, planned in plan.items():
            stored = checkpoint.tensor(sources[name])
            if name in outline.parameters:
                weight = outline.as_loaded(name, stored)
                if name in learned:
                    stored, kept = rounded_change(name, weight, learned[name], planned.dtype)
                    survival.append(kept)
                else:
                    stored = rounded(name, weight, planned.dtype)
            elif name in learned:  # a buffer of a module that was trained in full
                stored = learned[name].apply(stored)
            out.write(name, stored)
    forgotten = _write_config(source, folder, dtype)
    return Written(tuple(survival), outline.tied, _unused(outline, checkpoint) + forgotten)


def _sources(outline: Skeleton, checkpoint: Checkpoint) -> dict[str, str]:
    """The stored tensor that each one is made of, in the order of the base: of tied tensors the first that is there."""
    sources: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in outline.places:
            sources.setdefault(outline.places[name], name)
    return sources


def _plan(
    outline: Skeleton, checkpoint: Checkpoint, sources: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Stored]:
    """What is written: parameters in `dtype`, buffers (positions, scales) as they are."""
    plan = {}
    for name, source in sources.items():
        stored = checkpoint.tensors[source]
        cast = name in outline.parameters and stored.dtype.is_floating_point
        plan[name] = Stored(stored.shape, dtype if cast else stored.dtype)
    return plan


def check_places(saved: SavedAdapter, learned: Mapping[str, Change], places: Mapping[str, str]) -> None:
    """Refuse a change of what the base does not have, and of one of two tied tensors, which would change the other.

    Trained tokens are trained so: the head follows. `places`: each tensor's name to the one that stands for all that it
    is tied to.
    """
    for name, change in learned.items():
        if name not in places:
            raise InputError(f"{saved.folder}: the adapter changes {name}, which the base does not have")
        others = [other for other, place in places.items() if place == places[name] and other != name]
        if others and change.rows is None:
            raise InputError(
                f"{saved.folder}: the adapter changes {name}, which is tied to {others[0]}: the two are one tensor, and"
                " a merge would change both. Publish the adapter as it is: PEFT opens it"
            )


def _unequal_copies(outline: Skeleton, checkpoint: Checkpoint) -> str | None:
    """Tied tensors that the base stores more than once, in different values: transformers does not tie these."""
    first: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in outline.places:
            other = first.setdefault(outline.places[name], name)
            if other != name and not torch.equal(checkpoint.tensor(other), checkpoint.tensor(name)):
                return f"{other} and {name}"
    return None


def _unused(outline: Skeleton, checkpoint: Checkpoint) -> tuple[str, ...]:
    extra = [name for name in checkpoint.tensors if name not in outline.places]
    if not extra:
        return ()
    return (f"{len(extra)} tensors of the base that its model does not use were left out (first: {extra[0]}).",)


def _write_config(source: Source, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """The base's own configuration and generation settings, with the dtype of these weights; notes on what is not."""
    config = read_config(source.name, source.revision)
    _forget_code(config)
    config.dtype = dtype
    config.save_pretrained(folder)
    copy_of_base([GENERATION_CONFIG], source.name, source.revision, folder)
    return forget_places(folder, config)


def _forget_code(config: PretrainedConfig) -> None:
    """Drop the names of code that came with the base: it is not used here, nor among the files that are written."""
    vars(config).pop("auto_map", None)


def _whole(saved: SavedAdapter, source: Source, folder: Path, dtype: torch.dtype, note: str) -> Written:
    model = load_base(source.name, revision=source.revision, dtype=source.dtype, quantization=source.quantization)
    learned = changes(saved, {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Conv1D)})
    check_places(saved, learned, _tied_places(model))
    survival = fold(model, learned, dtype)
    dequantize(model, dtype)
    for name, parameter in model.named_parameters():
        rounded(name, parameter.data, dtype)
    cast_parameters(model, dtype)
    stated = read_config(source.name, source.revision).get_text_config()
    model.config.get_text_config().use_cache = getattr(stated, "use_cache", True)  # training's is off
    _forget_code(model.config)
    model.save_pretrained(folder)
    return Written(survival, is_tied(model), (note, *forget_places(folder, model.config)))


def _tied_places(model: PreTrainedModel) -> dict[str, str]:
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
