"""What all processes of a run do at once: numbers they tell each other, work that fails on all of them or on none, and
a folder that they fill together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from lorafocal import launch
from lorafocal.errors import InputError
from lorafocal.publish import hidden, published

EXPECTED = (InputError, OSError, SafetensorError)  # what files may meet; anything else ends the process, and the launch


def grouped() -> bool:
    """Whether this process computes in a group with others."""
    return dist.is_available() and dist.is_initialized()


def greatest(number: float, device: torch.device) -> float:
    """Collective: the largest of all ranks."""
    return _reduced(number, device, "max")


def least(number: float, device: torch.device) -> float:
    """Collective: the smallest of all ranks."""
    return _reduced(number, device, "min")


def anywhere(flag: bool, device: torch.device) -> bool:
    """Collective: whether `flag` is true on any rank."""
    return bool(greatest(flag, device))


def _reduced(number: float, device: torch.device, how: str) -> float:
    if not grouped():
        return number
    found = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(found, op={"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[how])
    return float(found)


def of_all_ranks(number: int) -> list[int]:
    """Collective: each rank's number, by rank."""
    if launch.world_size() == 1:
        return [number]
    from accelerate import PartialState

    slots = torch.zeros(launch.world_size(), dtype=torch.int64, device=PartialState().device)
    slots[launch.rank()] = number
    dist.all_reduce(slots)
    return slots.tolist()


def check_same(given: Mapping[str, Any]) -> None:
    """Collective: refuse ranks that differ in what they were given, JSON by what it is called. Raises InputError."""
    for name, value in given.items():
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        numbers = of_all_ranks(int.from_bytes(digest[:7], "big"))
        if others := [rank for rank, number in enumerate(numbers) if number != numbers[0]]:
            raise InputError(
                f"rank {others[0]} has another {name} than rank 0, and they would train as one: give all machines the"
                " same config, overrides, data, adapters and base (of a hub's state `model.revision`)"
            )


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that every rank runs; where it fails on one of them, it fails on all.

    Raises this rank's own error, or InputError with the words of the first rank that failed: the launcher may have
    ended that one before it can say them. A block that itself waits for other ranks must not fail on one of them before
    it has done its waiting.
    """
    error: Exception | None = None
    try:
        yield
    except EXPECTED as caught:
        error = caught
    failed = [rank for rank, bad in enumerate(of_all_ranks(error is not None)) if bad]
    why = _words_of(failed[0], str(error)) if failed else ""
    if error is not None:
        raise error
    if failed:
        raise InputError(f"rank {failed[0]} could not do its part: {why}")


def _words_of(rank: int, words: str) -> str:
    """Collective: what one rank says."""
    said = [words]
    if grouped():
        dist.broadcast_object_list(said, src=rank)
    return said[0]


@contextmanager
def published_by_all(target: Path, *, record: bool = True) -> Iterator[Path]:
    """Collective: `publish.published`, in the place of `target`, of a folder that every rank may write its files into.

    It is published by rank 0, when all ranks have left the block without an error. A rank on a machine that does not
    share the run's files gets a path where there is nothing.
    """
    with ExitStack() as stack:
        partial: Path | None = None
        with all_or_none():
            if launch.is_main():
                partial = stack.enter_context(published(target, replace=True, record=record))
        owner = of_all_ranks(os.getpid())[0]
        with all_or_none():
            yield partial or hidden(target, "partial", owner)
        with all_or_none():
            stack.close()
