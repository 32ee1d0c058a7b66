"""What an adapter changes in its base, tensor by tensor, from its files alone: no model is needed.

The slow twin is PEFT's own merge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from lorafocal.compatibility import STARTS
from lorafocal.errors import InputError
from lorafocal.model.dora import row_norms
from lorafocal.model.saved import WEIGHTS_FILE, SavedAdapter
from lorafocal.tensor_files import PEFT_PREFIX, read_tensors

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
LOW_RANK = frozenset(("lora", "rslora", "patterns", *STARTS))  # features that change a weight by scaling * B A, no more


class Change(Protocol):
    """What becomes of one tensor, in the dtype of the weight that is given (float32; float64 in a twin)."""

    @property
    def rows(self) -> Tensor | None:
        """The only rows that change, where not all do: `delta` and `apply` are then of those rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that `delta` and `apply` take and give."""

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight`."""

    def apply(self, weight: Tensor, delta: Tensor | None = None) -> Tensor:
        """The new weight; `delta` where it is known already."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scaling B A, and with a `magnitude` (DoRA) each row of that scaled to the length that was learned for it.

    `a` (rank, in), `b` (out, rank), `magnitude` (out,). `transposed`: the weight is stored as (in, out), as
    Conv1D's is.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    transposed: bool = False
    rows: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def delta(self, weight: Tensor) -> Tensor:
        a, b = self.a.to(weight.dtype), self.b.to(weight.dtype)
        delta = (b @ a).mul_(self.scaling)
        if self.magnitude is not None:
            own = weight.T if self.transposed else weight
            factor = (self.magnitude.to(weight.dtype) / row_norms(own, a, b, self.scaling))[:, None]
            delta = delta.mul_(factor).add_((factor - 1) * own)
        return delta.T if self.transposed else delta

    def apply(self, weight: Tensor, delta: Tensor | None = None) -> Tensor:
        return weight + (self.delta(weight) if delta is None else delta)


@dataclass(frozen=True, slots=True)
class Whole:
    """`values` in the tensor's place (a module that is trained in full), or in that of its `rows` (trained tokens)."""

    values: Tensor
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.values.to(weight.dtype) - weight

    def apply(self, weight: Tensor, delta: Tensor | None = None) -> Tensor:
        return self.values.to(weight.dtype)


def changes(adapter: SavedAdapter, transposed: Collection[str] = ()) -> dict[str, Change]:
    """What the adapter makes of each of its base's tensors, by their names in the base.

    `transposed` names the weights that are stored as (in, out), which no adapter's file tells.
    Raises InputError by the name of a tensor that is no part of LoRA, DoRA, modules or tokens trained in full (an
    adapter on embeddings among them), has no other half, does not fit its configuration or is not finite.
    """
    file, config = adapter.folder / WEIGHTS_FILE, adapter.config
    tensors = read_tensors(file)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{file}: {name} has values that are not finite: the file is damaged or training diverged")
    found: dict[str, Change] = {}
    left = dict(tensors)
    for full in sorted(name for name in tensors if name.endswith(_A)):
        layer = _of_the_base(full.removesuffix(_A))
        weight = f"{layer}.weight"
        found[weight] = _low_rank(f"{file}: {layer}", layer, config, left, transposed=weight in transposed)
    for full, values in left.items():
        name = _of_the_base(full)
        if full.endswith(_TOKENS):
            place = name.removesuffix(_TOKENS)
            found[f"{place}.weight"] = Whole(values, _token_rows(f"{file}: {place}", place, config, len(values)))
        elif _is_saved_whole(name, config):
            found[name] = Whole(values)
        else:
            raise InputError(
                f"{file}: {full} is no change of a linear layer, a module or tokens that can be put into a base, or"
                " lacks its other half. Publish the adapter as it is: PEFT opens it"
            )
    return found


def scaling(config: LoraConfig, layer: str, *, rank: int) -> float:
    """What PEFT multiplies B A of a layer of this rank by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _of_the_base(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def _low_rank(where: str, layer: str, config: LoraConfig, left: dict[str, Tensor], *, transposed: bool) -> LowRank:
    """The change of one layer, its tensors taken out of `left`."""
    a = left.pop(PEFT_PREFIX + layer + _A)
    b = left.pop(PEFT_PREFIX + layer + _B, None)
    magnitude = left.pop(PEFT_PREFIX + layer + _MAGNITUDE, None)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), layer), config.r)
    if b is None or (magnitude is not None) != bool(config.use_dora):
        raise InputError(f"{where} lacks a half of its change, or has one that the configuration does not know")
    if a.shape[0] != rank or b.shape[1] != rank or (magnitude is not None and magnitude.numel() != b.shape[0]):
        raise InputError(
            f"{where} is {tuple(b.shape)} times {tuple(a.shape)}, and the configuration says a rank of {rank}: file and"
            " configuration are of two adapters. Copy both again from where it was trained"
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return LowRank(a, b, scaling(config, layer, rank=rank), magnitude, transposed)


def _token_rows(where: str, place: str, config: LoraConfig, count: int) -> Tensor:
    """The ids of the trained tokens of one place, in the order of their rows."""
    ids = config.trainable_token_indices or []
    if isinstance(ids, Mapping):
        keys = [key for key in ids if place == key or place.endswith(f".{key}")]
        ids = ids[keys[0]] if keys else []
    if len(ids) != count:
        raise InputError(f"{where} has {count} trained tokens, the configuration names {len(ids)}: copy both again")
    return torch.tensor(ids)


def _is_saved_whole(name: str, config: LoraConfig) -> bool:
    """Whether a tensor is of a module that PEFT saves whole: it compares endings of the modules' names."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(saved) for module in modules for saved in config.modules_to_save or ())
