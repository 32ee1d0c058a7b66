"""Tensors that come one at a time, in safetensors files of bounded size, which several ranks write at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.publish import full_disk_named
from lorafocal.tensor_files import WAY_OUT, check_saved

SHARD_BYTES = 1_000_000_000  # what a rank holds in the machine's memory while it writes


def shard_name(stem: str, number: int) -> str:
    """`stem`.safetensors, `stem`-00002.safetensors, ... for 0, 1, ...: few tensors are in a file of the plain name."""
    return f"{stem}.safetensors" if number == 0 else f"{stem}-{number + 1:05d}.safetensors"


def write_shards(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    rank: int = 0,
    world: int = 1,
    most: int = SHARD_BYTES,
) -> list[Path]:
    """Write `tensors` into files of at most `most` bytes of them, or one larger tensor; the files of all ranks, in
    order (one, though empty, where nothing comes).

    All ranks go through the same tensors (on the CPU, no two in the same memory), as making one whole may need them
    all. File k is of rank k modulo `world`,
    which keeps its tensors until every rank has a file full, so that all write at once. Each file is read back,
    compared (`check_saved`) and forced to disk. What fails of this rank's files is raised at the end: the others
    wait for it within `tensors`. A rank that is none of 0 to `world` - 1 writes nothing.
    """
    number, size, failed = 0, 0, None
    held: dict[str, Tensor] = {}  # of this rank's next file
    for name, tensor in tensors:
        if size and size + tensor.nbytes > most:
            number, size = number + 1, 0
            if number % world == 0 and held:
                failed = failed or _written(folder / shard_name(stem, number - world + rank), held)
                held = {}
        size += tensor.nbytes
        if number % world == rank:
            held[name] = tensor.contiguous()
    if held or (size == 0 and rank == 0):
        failed = failed or _written(folder / shard_name(stem, number - number % world + rank), held)
    if failed is not None:
        raise failed
    return [folder / shard_name(stem, k) for k in range(number + 1)]


def _written(file: Path, tensors: Mapping[str, Tensor]) -> Exception | None:
    """Write one file, or say what went wrong."""
    try:
        with full_disk_named(file):
            save_file(dict(tensors), file)
            if tensors:
                check_saved(file, tensors)
            with file.open("rb") as written:
                os.fsync(written.fileno())
    except (InputError, OSError, SafetensorError) as error:
        return error
    return None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, each mapped from its file for as long as it lives.

    Only headers are read until a tensor's values are. They must not be written to. Raises InputError for a file that
    is missing or torn, and for a name that two files have.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._of: dict[str, safe_open] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file.name} cannot be read ({error}). {WAY_OUT}") from error
            for name in opened.keys():
                if name in self._of:
                    raise InputError(f"{file.name}: another file holds {name!r} too. {WAY_OUT}")
                self._of[name] = opened

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)
