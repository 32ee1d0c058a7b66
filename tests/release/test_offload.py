"""A gate that reads the layers from disk gives the numbers of the one that has them in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafocal.model.load import local_device
from lorafocal.model.saved import read_adapter
from lorafocal.release import measure, offload
from lorafocal.release.measure import Live, Merged, live_logps, merged_logps
from lorafocal.release.shards import Checkpoint
from lorafocal.release.weights import write_merged
from tests.saved_run import SavedRun, save_run


def numbers(run: SavedRun, merged: Path, *, tied: bool = True) -> tuple[Live, Merged]:
    live = live_logps(read_adapter(run.adapter), run.pairs, "float32")
    return live, merged_logps(merged, live, dtype="bfloat16", tied=tied)


def test_log_probs_are_bit_for_bit_those_of_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embeddings, a float32 base that training rounded to bfloat16, rsLoRA and a pattern of ranks."""
    run = save_run(tmp_path, tied=True, base_dtype=torch.float32, use_rslora=True, rank_pattern={"v_proj": 2})
    merged = tmp_path / "merged"
    merged.mkdir()
    write_merged(read_adapter(run.adapter), merged, dtype="bfloat16")
    in_memory = numbers(run, merged)
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    on_disk = numbers(run, merged)
    assert in_memory[0].notes == in_memory[1].notes == ()
    assert all("read its layers from disk" in side.notes[0] for side in on_disk)
    for before, after in (
        (in_memory[0].logps, on_disk[0].logps),
        (in_memory[0].reference, on_disk[0].reference),
        (in_memory[1].logps, on_disk[1].logps),
        (in_memory[1].served, on_disk[1].served),
    ):
        assert before is not None
        assert after is not None
        torch.testing.assert_close(torch.cat(after), torch.cat(before), rtol=0, atol=0)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_the_adapters_model_is_gone_when_the_merged_one_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None
) -> None:
    run = save_run(tmp_path, quantization=quantization)
    merged = tmp_path / "merged"
    merged.mkdir()
    write_merged(read_adapter(run.adapter), merged, dtype="bfloat16")
    alive: list[weakref.ref[torch.nn.Module]] = []
    left: list[int] = []

    def open_live(*given: Any) -> Any:
        policy, notes = offload.open_live(*given)
        alive.extend(map(weakref.ref, policy.modules()))
        return policy, notes

    def open_merged(*given: Any) -> Any:
        left.append(sum(module() is not None for module in alive))
        return offload.open_merged(*given)

    monkeypatch.setattr(measure, "open_live", open_live)
    monkeypatch.setattr(measure, "open_merged", open_merged)
    gc.disable()  # or it may come by itself
    try:
        numbers(run, merged, tied=False)
    finally:
        gc.enable()
    assert alive
    assert left == [0]


def test_what_torch_keeps_of_a_model_that_was_let_go_of_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4, 24))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 18)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    assert offload.free_bytes(torch.device("cuda", 0)) == 4 + 18 - 2


def test_no_layer_is_in_memory_after_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path)
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    policy, [note] = offload.open_live(read_adapter(run.adapter), "float32")
    assert "0 GiB were free" in note
    with torch.no_grad():
        policy(torch.tensor([run.pairs[0].prompt_ids], device=local_device()), use_cache=False)
    held = {name: parameter.device.type for name, parameter in policy.named_parameters()}
    assert {device for name, device in held.items() if ".layers." in name} == {"meta"}
    assert {device for name, device in held.items() if ".layers." not in name} == {local_device().type}


def test_memory_that_suffices_is_used_and_so_it_is_where_layers_cannot_be_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path)
    saved = read_adapter(run.adapter)
    needed = 4 * sum(stored.bytes // stored.dtype.itemsize for stored in Checkpoint.open(saved.base).tensors.values())

    def on_disk(free: float, dtype: str = "float32") -> bool:
        monkeypatch.setattr(offload, "free_bytes", lambda device: int(free))
        return offload.too_big(saved.base, None, held_in="bfloat16", dtype=dtype) is not None

    assert on_disk(needed)  # a forward needs more than the weights
    assert not on_disk(2 * needed)
    assert not on_disk(needed, dtype="bfloat16")
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    for number, settings in enumerate(({"use_dora": True}, {"trainable_token_indices": [3]}, {"quantization": "nf4"})):
        other = save_run(tmp_path / str(number), **settings)  # type: ignore[arg-type]
        policy, notes = offload.open_live(read_adapter(other.adapter), "float32")
        assert notes == ()
        assert not any(parameter.is_meta for parameter in policy.parameters())
