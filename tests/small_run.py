"""A training run small enough to be saved and killed hundreds of times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lorafocal.checkpoint import load_state, save_state
from lorafocal.engines.whole import Whole
from lorafocal.publish import published

EXTRA = {"global_step": 3, "pairs_seen": 12, "loss": 0.1 + 0.2, "ids": ["a", "b"], "best": None}


class Paged(bitsandbytes.optim.AdamW):
    """Marks its buffers as paging on a GPU does, and takes no others."""

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = True
        return buffer

    def prefetch_state(self, p: Tensor) -> None:
        assert self.state[p]["state1"].is_paged
        assert self.state[p]["state2"].is_paged


class Run:
    """A low-rank layer on a frozen one, an optimizer with two groups, and a cosine schedule with warm-up."""

    def __init__(self, kind: str = "adamw", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base = torch.randn(8, 8, generator=generator)
        self.parameters = {
            "model.q.lora_A.weight": nn.Parameter(torch.randn(4, 8, generator=generator)),
            "model.q.lora_B.weight": nn.Parameter(torch.zeros(8, 4)),
        }
        lora_a, lora_b = self.parameters.values()
        groups = [{"params": [lora_a], "weight_decay": 0.1}, {"params": [lora_b], "weight_decay": 0.0}]
        make: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
            "amsgrad": lambda: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
            "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
            "plain sgd": lambda: torch.optim.SGD(groups, lr=1e-2),
            "8 bits": lambda: bitsandbytes.optim.AdamW(groups, lr=1e-2, optim_bits=8, min_8bit_size=1),
            "8 bits of large tensors": lambda: bitsandbytes.optim.AdamW(
                groups, lr=1e-2, optim_bits=8, min_8bit_size=33
            ),
            "32 bits": lambda: bitsandbytes.optim.AdamW(groups, lr=1e-2, optim_bits=32),
            "paged": lambda: Paged(groups, lr=1e-2, optim_bits=8, min_8bit_size=1, is_paged=True),
        }
        self.optimizer = make[kind]()
        self.engine = Whole(SimpleNamespace(engine="one-process", world_size=1))  # type: ignore[arg-type]
        self.engine.optimizer = self.optimizer
        self.scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=2, num_training_steps=10)

    def train(self, first: int, last: int) -> None:
        """Steps `first` to `last` - 1; the data of a step is a function of its number."""
        lora_a, lora_b = self.parameters.values()
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            (x @ self.base.T + x @ lora_a.T @ lora_b.T).tanh().square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, extra: dict[str, Any] | None = None, **size: int) -> None:
        folder.mkdir(exist_ok=True)
        save_state(folder, **self.parts, extra=EXTRA if extra is None else extra, **size)

    def load(self, folder: Path) -> dict[str, Any]:
        return load_state(folder, **self.parts)

    @property
    def parts(self) -> dict[str, Any]:
        return {"engine": self.engine, "parameters": self.parameters, "scheduler": self.scheduler}

    def everything(self) -> dict[str, Any]:
        """All that decides the next step, comparable with ==."""
        return {
            "parameters": {name: bits(value) for name, value in self.parameters.items()},
            "state": {
                name: {key: bits(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
                for name, parameter in self.parameters.items()
            },
            "groups": [
                {key: bits(value) for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ],
            "scheduler": self.scheduler.state_dict(),
        }


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
    return value


def checkpoint(run: Run, run_dir: Path, step: int, *, replace: bool = False) -> None:
    with published(run_dir / f"checkpoint-{step}", replace=replace) as folder:
        run.save(folder, {"global_step": step})
