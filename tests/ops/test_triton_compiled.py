"""The Triton kernels, compiled ahead of time for the GPUs people train on: none spills a register."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton

from lorafocal.ops.triton import TRITON
from lorafocal.ops.triton.launch import block_and_warps, launch
from tests.made_parts import made_part
from tests.triton_cases import TRANSFORMS
from tests.triton_compiled import SHAPES, TARGETS, Launch, caught, compiled, launches
from tests.triton_table import PAGE, SHAPE, table


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def uncommon(launch: Launch) -> tuple:
    """What tells two launches apart for the compiler."""
    source = launch.source
    return launch.kernel.fn, tuple(source.signature.values()), str(source.constants), str(source.attrs), launch.warps


@pytest.mark.engine
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_kernel_compiles_without_spills(capability, dtype, tmp_path):
    seen = set()
    for shape in SHAPES if dtype == torch.bfloat16 else ["Llama-3-8B"]:
        for name, one in launches(shape, dtype).items():
            if (key := uncommon(one)) in seen:
                continue
            seen.add(key)
            result = compiled(one, capability, tmp_path)
            assert result.spilled == 0, f"{name} at {shape}: {result}"
            assert result.registers <= 128, f"{name} at {shape}: {result}"  # two programs of 8 warps a multiprocessor
    assert len(seen) >= 9


@pytest.mark.engine
def test_the_page_s_table_of_registers_is_of_these_kernels():
    """Its figures too, where this is the Triton that it was written with."""
    written = made_part(PAGE.read_text(encoding="utf-8"), "registers")
    rows = [line.split("|")[1].strip() for line in written.splitlines() if line.startswith("| ")][1:]
    assert rows == list(launches(SHAPE, torch.bfloat16))
    if written.startswith(f"Triton {triton.__version__},"):
        assert written.endswith(table()), "run python -m tests.triton_table"


def test_what_is_compiled_is_what_is_launched():
    """Constants and types come from the arguments of the library's own launches."""
    head = launches("Llama-3-8B", torch.bfloat16)["head_fold: errors"]
    block, warps = block_and_warps(128256, 4096)
    assert head.source.signature["error"] == "*bf16"
    assert head.source.signature["logits"] == "*fp32"
    assert (head.arguments["BLOCK"], head.warps) == (block, warps)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_log_probs_come_from_one_compiled_kernel_whatever_is_asked_for_beside_them(wide, transform):
    """A policy's, with a gradient, and its reference's, without, are compared by exactly 0: sums in another order are
    off in their last bits."""
    rows, width = 8, 128256
    logits, labels = (
        torch.empty(rows, width, dtype=wide, device="meta"),
        torch.empty(rows, dtype=torch.long, device="meta"),
    )
    kernels = set()
    for dtype in (None, torch.bfloat16, wide):
        for collisions in (None, torch.empty(rows, dtype=torch.float64, device="meta")):
            with caught() as noted:
                TRITON.head_fold_(logits, labels, dtype, transform, collisions)
            first, *errors = noted
            kernels.add(uncommon(first))
            assert len(errors) == (dtype is not None)
    assert len(kernels) == 1


@pytest.mark.parametrize("width", [1, 2, 511, 512, 1024, 4097, 2**20])
def test_a_program_holds_at_most_16_entries_a_thread(width):
    block, warps = block_and_warps(width, 4096)
    assert block <= 16 * 32 * warps
    assert block >= min(width, 4096)


def test_a_launch_does_not_break_a_compiled_graph():
    class Doubling:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
            return lambda x: x.mul_(grid[0])

    def launched(x: torch.Tensor) -> torch.Tensor:
        launch(Doubling(), [2], x, x)
        return x

    assert torch.equal(torch.compile(launched, backend="eager", fullgraph=True)(torch.ones(3)), torch.full((3,), 2.0))
