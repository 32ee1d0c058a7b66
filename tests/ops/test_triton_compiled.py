"""The Triton kernels, compiled ahead of time for the GPUs people train on: none spills a register."""

from __future__ import annotations

import pytest
import torch

from lorafocal.ops.triton.launch import block_and_warps
from tests.triton_compiled import SHAPES, TARGETS, Launch, compiled, launches


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def uncommon(launch: Launch) -> tuple:
    """What tells two launches apart for the compiler."""
    source = launch.source
    return tuple(source.signature.values()), str(source.constants), str(source.attrs), launch.warps


@pytest.mark.engine
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_kernel_compiles_without_spills(capability, dtype, tmp_path):
    seen = set()
    for shape in SHAPES if dtype == torch.bfloat16 else ["Llama-3-8B"]:
        for name, launch in launches(shape, dtype).items():
            if (key := (launch.kernel.__module__, uncommon(launch))) in seen:
                continue
            seen.add(key)
            result = compiled(launch, capability, tmp_path)
            assert result.spilled == 0, f"{name} at {shape}: {result}"
            assert result.registers <= 128, f"{name} at {shape}: {result}"  # two programs of 8 warps a multiprocessor
    assert len(seen) >= 9


def test_what_is_compiled_is_what_is_launched():
    """Constants and types come from the arguments of the library's own launches."""
    head = launches("Llama-3-8B", torch.bfloat16)["head_fold"]
    block, warps = block_and_warps(128256, 4096)
    assert head.source.signature["error"] == "*bf16"
    assert head.source.signature["logits"] == "*fp32"
    assert (head.arguments["BLOCK"], head.warps) == (block, warps)


@pytest.mark.parametrize("width", [1, 2, 511, 512, 1024, 4097, 2**20])
def test_a_program_holds_at_most_16_entries_a_thread(width):
    block, warps = block_and_warps(width, 4096)
    assert block <= 16 * 32 * warps
    assert block >= min(width, 4096)
