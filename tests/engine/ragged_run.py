"""A run whose steps are uneven over two processes, and what each of them saw: started by torchrun, or called alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from lorafocal.trainer import FILLER, FocalPOTrainer
from tests.tiny import pairs, tiny_policy, trainer

PAIRS, PAIRS_PER_STEP, EPOCHS, HELD_OUT = 16, 5, 2, 6  # the last step of an epoch has one pair: a rank has none
STEPS = 8
STOP_AT = 3  # between two logs, which come every second step


class Record(TrainerCallback):
    """Pairs, backwards, gradient reductions and optimiser steps of this process, step by step."""

    def __init__(self, made: FocalPOTrainer) -> None:
        self.trainer = made
        self.steps: list[dict[str, Any]] = []
        self.engine = ""
        made._pack_loss = self._watch(made._pack_loss)  # type: ignore[method-assign]

    def _watch(self, pack_loss: Callable[..., Any]) -> Callable[..., Any]:
        def watched(model: Any, pack: Any, step_pairs: int) -> Any:
            step = self.steps[-1]
            step["ids"] += [pair for pair in pack.pair_ids if pair != FILLER.id]
            step["packs"] += 1
            step["flags"].append(self.trainer.accelerator.gradient_state.sync_gradients)
            return pack_loss(model, pack, step_pairs)

        return watched

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine = type(self.trainer.model_wrapped).__name__
        if self.engine == "DistributedDataParallel":
            self.trainer.model_wrapped.register_comm_hook(None, self._count_reduction)

    def _count_reduction(self, state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        self.steps[-1]["reductions"] += 1
        return allreduce_hook(None, bucket)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({"ids": [], "packs": 0, "flags": [], "reductions": 0, "optimizer_steps": 0})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1]["optimizer_steps"] += 1


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP_AT:
            control.should_save = control.should_training_stop = True


def make(folder: Path) -> FocalPOTrainer:
    return trainer(
        folder,
        pairs(PAIRS),
        pairs(HELD_OUT, seed=2),
        model=tiny_policy(dtype=torch.float64, trained=False),
        pairs_per_step=PAIRS_PER_STEP,
        num_train_epochs=EPOCHS,
        max_steps=-1,
        logging_steps=2,
        tokens_per_pack=40,
        eval_strategy="epoch",
        lr_scheduler_type="cosine",
    )


def ragged_run(folder: Path) -> dict[str, Any]:
    """Train to the end in `folder`; what this process saw."""
    made = make(folder)
    seen = Record(made)
    made.add_callback(seen)
    made.train()
    made.save_model()
    return {
        "world": made.args.world_size,
        "engine": seen.engine,
        "steps": seen.steps,
        "logs": made.state.log_history[:-1],
    }


def resumed_run(folder: Path) -> dict[str, Any]:
    """The same run, stopped after a step between two logs and resumed."""
    first = make(folder)
    first.add_callback(StopAt())
    first.train()
    second = make(folder)
    second.train(resume_from_checkpoint=True)
    second.save_model()
    return {"logs": second.state.log_history[:-1]}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    result = ragged_run(root / "whole") | {"resumed": resumed_run(root / "resumed")}
    rank = torch.distributed.get_rank()
    (root / f"rank-{rank}.json").write_text(json.dumps(result))
