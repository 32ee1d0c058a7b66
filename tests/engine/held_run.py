"""Counts what a process holds in the middle of full-parameter training, engine after engine: started by torchrun."""

from __future__ import annotations

import gc
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorafocal import launch
from lorafocal.engines import zero
from lorafocal.trainer import FocalPOTrainer
from tests.engine.ragged_run import HANGS_S
from tests.test_activation_bytes import MID
from tests.tiny import pairs, trainer

ENGINES = ("zero1", "zero2", "zero3", "fsdp2")
COUNTED_IN = 2  # the optimiser's states are there from the second step on
BUCKET_ENTRIES = 1000


def held_bytes() -> int:
    """Of every tensor that Python can reach, gradients and parts among them, each storage once."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in local if t.device.type == "cpu"}
    return sum(storage.nbytes() for storage in storages.values())


def count(folder: Path, engine: str) -> int:
    """Bytes that training adds to the process, between the last backward of a step and the weights' change."""
    before = held_bytes()
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**MID)).to(torch.bfloat16)
    made: FocalPOTrainer = trainer(
        folder, pairs(16), model=base, engine=engine, objective="sft", max_steps=COUNTED_IN, optim="adamw_torch"
    )
    seen: list[int] = []
    step = made.engine.step

    def counted() -> None:
        seen.append(held_bytes() - before)
        step()

    made.engine.step = counted  # type: ignore[method-assign]
    made.train()
    return seen[-1]


def everything(root: Path) -> None:
    zero.BUCKET_ENTRIES, zero.PERSISTENT_ENTRIES = BUCKET_ENTRIES, 0
    found: dict[str, Any] = {engine: count(root / engine, engine) for engine in ENGINES}
    (root / f"rank-{launch.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS_S))
    everything(Path(sys.argv[1]))
    launch.shutdown()
