"""Safetensors files one tensor at a time: what others wrote is read, and what is written others read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorafocal.errors import InputError
from lorafocal.release.shards import Checkpoint, ShardWriter, Stored
from tests.tiny import tiny_base

TENSORS = {
    "wide": torch.randn(5, 7),
    "half": torch.randn(3, 3).bfloat16(),
    "number": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "turned": torch.randn(4, 6).T,
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(5),
    "ü": torch.randn(2).half(),
}


def write(folder: Path, tensors: dict[str, Tensor], most: int = 1 << 40) -> None:
    folder.mkdir()
    plan = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with ShardWriter(folder, plan, most) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "model", TENSORS)
    ours, theirs = Checkpoint.open(str(tmp_path / "model")), load_file(tmp_path / "model" / "model.safetensors")
    assert ours.tensors.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert ours.tensors[name] == Stored(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(ours.tensor(name), tensor)
        assert torch.equal(theirs[name], tensor)


def test_every_tensor_is_aligned_for_readers_that_map_it(tmp_path: Path) -> None:
    odd = {"flag": torch.ones(3, dtype=torch.bool), "half": torch.ones(5).half(), "full": torch.ones(3)}
    write(tmp_path / "model", odd)
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in odd.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0
    assert len(content) == 8 + length + sum(tensor.nbytes for tensor in odd.values())


@pytest.mark.parametrize("most", [1 << 40, 20_000, 1])
def test_transformers_loads_what_is_written_and_shards_alike(tmp_path: Path, most: int) -> None:
    model = tiny_base()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    (tmp_path / "ours").mkdir()
    write(tmp_path / "files", model.state_dict(), most)
    for file in (tmp_path / "files").iterdir():
        file.rename(tmp_path / "ours" / file.name)
    model.config.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    files = {folder: {file.name for file in (tmp_path / folder).iterdir()} for folder in ("ours", "theirs")}
    assert files["ours"] == files["theirs"] - {"generation_config.json"}
    if most < 1 << 40:
        index = [json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("ours", "theirs")]
        assert index[0]["metadata"]["total_size"] == index[1]["metadata"]["total_size"]
        assert index[0]["weight_map"].keys() == index[1]["weight_map"].keys()
    for name in Checkpoint.open(str(tmp_path / "theirs")).tensors:
        assert torch.equal(Checkpoint.open(str(tmp_path / "theirs")).tensor(name), model.state_dict()[name])


def test_what_is_not_as_planned_is_never_written(tmp_path: Path) -> None:
    plan = {"a": Stored((2, 2), torch.float32), "b": Stored((3,), torch.float32)}
    with pytest.raises(ValueError, match="planned as"), ShardWriter(tmp_path, plan) as out:
        out.write("a", torch.ones(2, 2).bfloat16())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="b among them"), ShardWriter(tmp_path, plan) as out:
        out.write("a", torch.ones(2, 2))


@pytest.mark.row("S9")
def test_an_index_that_leads_elsewhere_is_refused_before_any_read(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(InputError, match=r"outside its folder|bare name"):
            Checkpoint.open(str(tmp_path / "base"))


def test_a_torn_file_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "model", TENSORS)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Checkpoint.open(str(tmp_path / "model"))
