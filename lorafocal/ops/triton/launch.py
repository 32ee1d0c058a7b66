"""What every kernel here is launched with: rows whose last dimension is dense, on their device, computed in `wide`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where neighbours of the last dimension are not neighbours in memory."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def wide(dtype: torch.dtype) -> tl.dtype:
    """What is computed in: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def block_and_warps(width: int, largest: int) -> tuple[int, int]:
    """Entries of a row a program holds at a time, and its warps: at most 16 entries a thread, so that none spill."""
    block = min(triton.next_power_of_2(width), largest)
    return block, min(8, max(1, block // 512))


def launch(kernel: Any, grid: Sequence[int], on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of `on`, which need not be the current one: compiled graphs see to that themselves."""
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(on):
        kernel[tuple(grid)](*arguments, **constants)
