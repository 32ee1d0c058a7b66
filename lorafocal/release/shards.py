"""A model's safetensors files, one tensor at a time: read from a base, written beside an index.

Neither side ever holds a shard: a tensor is mapped from its file and let go, and a file is begun with a header made of
names, dtypes and shapes alone. (Format: 8 bytes of length, a JSON header, the tensors' bytes without gaps.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.model.load import weight_files
from lorafocal.model.save_model import INDEX, MAX_SHARD_BYTES

# Names of the dtypes in the header of a file.
_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: code for code, dtype in _CODES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tensor is in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model on disk, by name, and the file of each; file by file in the order of the files' names."""

    tensors: Mapping[str, Stored]
    files: Mapping[str, Path]

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Read the headers of a folder or of a hub's cache. No weight is read.

        Raises InputError where there are no safetensors, an index leads outside its folder (`weight_files`), or a file
        is damaged or holds numbers of a kind that no float model has.
        """
        tensors: dict[str, Stored] = {}
        files: dict[str, Path] = {}
        for file in sorted(weight_files(name, revision), key=lambda file: file.name):
            with _opened(file) as stored:
                for key in stored.keys():
                    part = stored.get_slice(key)
                    tensors[key] = Stored(tuple(part.get_shape()), _dtype(part.get_dtype(), key, file))
                    files[key] = file
        return cls(tensors, files)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored, mapped from its file for as long as it lives. It must not be written to."""
        with _opened(self.files[name]) as stored:
            return stored.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise InputError(f"{file.name} is damaged: {error}. Download it again, or restore it") from error


def _dtype(code: str, name: str, file: Path) -> torch.dtype:
    if code not in _CODES:
        raise InputError(f"{file.name}: {name} is stored as {code}, which is not read here: use a float original")
    return _CODES[code]


class ShardWriter:
    """Writes `model.safetensors`, or `model-0000k-of-0000n.safetensors` and their index, as transformers reads them.

    `plan` names all tensors in the order in which they come; a file holds at most `max_shard_bytes` of them, or one
    larger tensor. Use it as a context; leaving it without an error demands that every tensor was written.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Stored], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._plan = plan
        shards = _divided(plan, max_shard_bytes)
        count = len(shards)
        files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        files = files if count > 1 else ["model.safetensors"]
        self._places: dict[str, tuple[Path, int]] = {}
        for file, names in zip(files, shards, strict=True):
            self._places |= _begin(folder / file, {name: plan[name] for name in names})
        if count > 1:
            _write_index(folder / INDEX, plan, dict(zip(files, shards, strict=True)))
        self._left = set(plan)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were never written, {min(self._left)} among them")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. Raises ValueError where it is not as planned."""
        planned = self._plan[name]
        if (tuple(tensor.shape), tensor.dtype) != (planned.shape, planned.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned as {planned}")
        file, start = self._places[name]
        if tensor.numel():
            with file.open("r+b") as out:
                out.seek(start)
                out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)


def _divided(plan: Mapping[str, Stored], most: int) -> list[list[str]]:
    """The names of each file, in order, filled one after the other."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, stored in plan.items():
        if shards[-1] and size + stored.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += stored.bytes
    return shards


def _begin(file: Path, tensors: Mapping[str, Stored]) -> dict[str, tuple[Path, int]]:
    """Write a file's header and reserve its length; where each tensor's bytes start.

    The widest numbers come first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        span = [offset, offset + stored.bytes]
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": span}
        offset += stored.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + offset)
    return {name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in tensors}


def _write_index(file: Path, plan: Mapping[str, Stored], shards: Mapping[str, Sequence[str]]) -> None:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    record = {"metadata": {"total_size": sum(stored.bytes for stored in plan.values())}, "weight_map": weight_map}
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
