"""Ranks that are forks of this process: they join each other in a second, and one of them may die."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from tests.engine.launches import Together

WAITS_S = 20  # for a rank that does not come


def forked_ranks(work: Callable[[int], None], folder: Path, world: int = 2, *, waits_s: float = WAITS_S) -> list[int]:
    """Run `work(rank)` in `world` processes that share a group; their exit codes (negative: the signal that killed)."""
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    children = [_forked(work, rank, world, meeting, waits_s) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def both(work: Callable[[Path], Any], folder: Path, *, waits_s: float = WAITS_S) -> Together:
    """Run `work(folder)` in two ranks, each of which leaves its answer in `folder`; how they ended."""

    def answered(rank: int) -> None:
        (folder / f"rank-{rank}.json").write_text(json.dumps(work(folder)))

    codes = forked_ranks(answered, folder, waits_s=waits_s)
    return Together(max(map(abs, codes)), f"the ranks ended with {codes}, see the errors they printed", folder)


def _forked(work: Callable[[int], None], rank: int, world: int, meeting: Path, waits_s: float) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(torch.get_num_threads())  # makes the pool anew, before several threads do so at once
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=waits_s)
        )
        PartialState._reset_state()
        PartialState(cpu=True)
        work(rank)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)
