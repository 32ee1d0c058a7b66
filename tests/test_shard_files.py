"""Tensors come out of files as they went in, whoever wrote which, and a rank that cannot write says so at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafocal.shard_files
from lorafocal.errors import InputError
from lorafocal.shard_files import StoredTensors, shard_name, write_shards

TENSORS = {f"layer.{n}": torch.arange(n, n + 25).float() for n in range(7)}  # 100 bytes each
MOST = 210  # two in a file


def write(folder: Path, world: int, tensors: dict[str, Tensor] = TENSORS, most: int = MOST) -> list[Path]:
    """As `world` ranks do, one after the other; what each says must be the same."""
    (said,) = {
        tuple(write_shards(folder, "part", tensors.items(), rank=rank, world=world, most=most)) for rank in range(world)
    }
    return list(said)


def size(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_files_do_not_depend_on_how_many_write_them(tmp_path: Path, world: int) -> None:
    files = write(tmp_path, world)
    assert [file.name for file in files] == [shard_name("part", n) for n in range(4)]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert [size(file) for file in files] == [200, 200, 200, 100]
    stored = StoredTensors(files)
    assert list(stored) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name], tensor)


def test_few_tensors_are_one_file_of_the_plain_name_and_none_are_an_empty_one(tmp_path: Path) -> None:
    assert write(tmp_path, 2, most=10**6) == [tmp_path / "part.safetensors"]
    assert load_file(tmp_path / "part.safetensors").keys() == TENSORS.keys()
    (tmp_path / "none").mkdir()
    assert write(tmp_path / "none", 2, {}) == [tmp_path / "none" / "part.safetensors"]
    assert len(StoredTensors([tmp_path / "none" / "part.safetensors"])) == 0


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    tensors = {"small": torch.ones(5), "large": torch.ones(500), "last": torch.ones(5)}
    assert [size(file) for file in write(tmp_path, 2, tensors)] == [20, 2000, 20]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_rank_holds_one_file_at_a_time_and_all_ranks_write_at_once(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a large model would have to fit into the machine's memory, or one rank would write while the others wait."""
    came: list[str] = []
    written: dict[str, int] = {}

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS.items():
            came.append(name)
            yield name, tensor

    def save(tensors: dict[str, Tensor], file: Path) -> None:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= MOST
        written[file.name] = len(came)
        save_file(tensors, file)

    monkeypatch.setattr(lorafocal.shard_files, "save_file", save)
    for rank in range(world):
        came.clear()
        write_shards(tmp_path, "part", watched(), rank=rank, world=world, most=MOST)
    rounds = [written[shard_name("part", n)] for n in range(4)]  # tensors that had come when the file was written
    assert rounds == [min(2 * world * (n // world + 1) + 1, len(TENSORS)) for n in range(4)]


def test_a_rank_without_the_folder_writes_nothing(tmp_path: Path) -> None:
    assert len(write_shards(tmp_path / "elsewhere", "part", TENSORS.items(), rank=-1, world=2, most=MOST)) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.row("47")
@pytest.mark.parametrize("broken", [torch.empty(0), torch.full((25,), float("nan")), torch.full((25,), float("inf"))])
def test_what_must_not_be_saved_is_refused_after_all_tensors_have_come(tmp_path: Path, broken: Tensor) -> None:
    """The other ranks take part in making them: a rank that left earlier would keep them waiting."""
    tensors, came = TENSORS | {"layer.1": broken}, []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            came.append(name)
            yield name, tensor

    with pytest.raises(InputError, match=r"part\.safetensors: 'layer\.1' (is empty|holds NaN or infinity)"):
        write_shards(tmp_path, "part", watched(), rank=0, world=2, most=MOST)
    assert came == list(TENSORS)
    write_shards(tmp_path, "part", tensors.items(), rank=1, world=2, most=MOST)  # its files are good


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_met_at_the_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(tensors: dict[str, Tensor], file: Path) -> None:
        raise error

    monkeypatch.setattr(lorafocal.shard_files, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*part\.safetensors"):
        write(tmp_path, 1)


def test_torn_missing_and_doubled_files_are_named(tmp_path: Path) -> None:
    files = write(tmp_path, 1)
    (tmp_path / "torn.safetensors").write_bytes(files[1].read_bytes()[:-3])
    for wrong in (tmp_path / "torn.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(InputError, match=f"{wrong.stem}.*cannot be read"):
            StoredTensors([files[0], wrong])
    with pytest.raises(InputError, match=r"another file holds 'layer\.0' too"):
        StoredTensors([files[0], files[0]])
