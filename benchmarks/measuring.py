"""What measurements have in common: seconds on a device, its peak of matrix products, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str, *, times: int = 5, warmup: int = 2) -> float:
    """Median wall seconds of one call."""
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product_peak(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the fastest of the (M, K, N) matrix products: the share of a peak is a share of this."""
    rates = []
    for m, k, n in shapes:
        left = torch.randn(m, k, dtype=dtype, device=device)
        right = torch.randn(n, k, dtype=dtype, device=device)
        rates.append(2 * m * k * n / seconds(lambda a=left, b=right: a @ b.T, device, times=7, warmup=3))
    return max(rates)


def start_counting(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """On a GPU, what was allocated at most; on a CPU, the process's largest resident memory, libraries included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return _status("VmHWM:")  # `ru_maxrss` would carry the parent's over


def held_gib(device: str) -> float:
    """What is held now."""
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else _status("VmRSS:")


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(name)[2].split()[0]) / 2**20


class SavedBytes:
    """Within, counts the bytes that autograd keeps for the backward, each storage once, without `known` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor)

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self._storages.values())
