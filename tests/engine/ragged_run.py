"""Runs whose steps are uneven over two processes, and what each of them saw, or one process alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from lorafocal import launch
from lorafocal.comparison import FILLER
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.interrupt import StopOnSignal
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import pairs, tiny_policy, trainer

PAIRS, PAIRS_PER_STEP, EPOCHS, HELD_OUT = 17, 8, 2, 7  # the last step of an epoch has one pair: a rank has none
STEPS = 6
OTHERS = ("kto", "odpo", "orpo", "beta-dpo", "gamma-simpo", "group-dpo", "relative-dpo")
HANGS_S = 15  # ranks that wait for each other for so long will wait for ever

# Which rank hears SIGTERM in which step; everything stops after step 2, between two logs.
INTERRUPTIONS: dict[str, dict[int, int]] = {"the other rank": {1: 2}, "both ranks": {0: 2, 1: 2}}
RESUMED = "the other rank"


class Record(TrainerCallback):
    """Pairs, losses, backwards, gradients, reductions and optimiser steps of this process, step by step."""

    def __init__(self, made: FocalPOTrainer) -> None:
        self.trainer = made
        self.steps: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.engine = ""
        made._part_loss = self._watch(made._part_loss)  # type: ignore[method-assign]
        made.health.see_pack = self._see  # type: ignore[method-assign]

    def _watch(self, part_loss: Callable[..., Any]) -> Callable[..., Any]:
        def watched(model: Any, part: Any, step_pairs: int) -> Any:
            step = self.steps[-1]
            step["ids"] += [pair for pair in part.pack.pair_ids if pair != FILLER.id]
            step["packs"] += 1
            step["flags"].append(self.trainer.accelerator.gradient_state.sync_gradients)
            return part_loss(model, part, step_pairs)

        return watched

    def _see(self, losses: torch.Tensor, pair_ids: tuple[str, ...], step: int) -> None:
        self.steps[-1]["losses"] |= zip(pair_ids, losses.tolist(), strict=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine = type(self.trainer.model_wrapped).__name__
        if self.engine == "DistributedDataParallel":
            self.trainer.model_wrapped.register_comm_hook(None, self._count_reduction)

    def _count_reduction(self, state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        self.steps[-1]["reductions"] += 1
        return allreduce_hook(None, bucket)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({"ids": [], "losses": {}, "packs": 0, "flags": [], "reductions": 0, "optimizer_steps": 0})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients as the optimiser meets them (clipping is off)."""
        step = len(self.steps)
        self.gradients |= {f"{step}/{name}": p.grad.clone() for name, p in self.trainer.trained.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1]["optimizer_steps"] += 1


class Hear(TrainerCallback):
    """SIGTERM, while the given step is computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def judged(pair: TokenizedPair, number: int) -> TokenizedPair:
    """With all that the other objectives ask for."""
    scores = {"score_chosen": 2.0 + number % 5 / 2, "score_rejected": 1.5}
    return replace(pair, **scores, group="abc"[number % 3], embedding=(1.0, number % 4 - 1.5))


def make(folder: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> FocalPOTrainer:
    defaults = {
        "pairs_per_step": PAIRS_PER_STEP,
        "num_train_epochs": EPOCHS,
        "max_steps": -1,
        "logging_steps": 3,
        "tokens_per_pack": 40,
        "eval_strategy": "epoch",
        "lr_scheduler_type": "cosine",
    }
    model = tiny_policy(dtype=dtype, trained=False)
    train, held_out = (
        [judged(pair, n) for n, pair in enumerate(part)] for part in (pairs(PAIRS), pairs(HELD_OUT, seed=2))
    )
    return trainer(folder, train, held_out, model=model, **(defaults | settings))


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


def gradients_in_float32(folder: Path) -> None:
    """`gradients.safetensors`: of every adapter tensor at every step of an epoch, at weights that hardly move."""
    settings = {"num_train_epochs": 1, "learning_rate": 1e-6, "max_grad_norm": 0.0, "eval_strategy": "no"}
    made = make(folder, torch.float32, **settings)
    seen = Record(made)
    made.add_callback(seen)
    made.train()
    if launch.is_main():
        save_file(seen.gradients, folder / "gradients.safetensors")


def other_objectives(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each step of an epoch logs under objectives that need sums over the step, scores, or no reference."""
    settings = {"num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "no"}
    logs = {}
    for name in OTHERS:
        made = make(folder / name, objective=name, learning_rate=3e-2, **settings)
        made.train()
        logs[name] = [line for line in made.state.log_history if "loss" in line]
    return logs


def refused_first_step(folder: Path) -> str:
    """What this rank is told of a first step whose pairs a factor turns round."""
    made = make(folder, objective="simpo", beta=2.0, focal={"form": "p_gamma", "gamma": 1.0}, eval_strategy="no")
    try:
        made.train()
    except InputError as refusal:
        return str(refusal)
    return ""


def interrupted_run(folder: Path, hear: Mapping[int, int]) -> dict[str, Any]:
    """The same run, stopped by a signal that some ranks hear."""
    made = make(folder)
    stop = StopOnSignal()
    made.add_callback(stop)
    if launch.rank() in hear:
        made.add_callback(Hear(hear[launch.rank()]))
    with stop.watching():
        made.train()
    left = sorted(path.name for path in folder.glob("checkpoint-*"))
    return {"stopped_at": made.state.global_step, "signal": int(stop.received or 0), "checkpoints": left}


def resumed_run(folder: Path) -> dict[str, Any]:
    made = make(folder)
    made.train(resume_from_checkpoint=True)
    made.save_model()
    return {"logs": made.state.log_history[:-1]}


def first_and_others(folder: Path) -> list[str]:
    """What this rank finds on disk in a block that rank 0 runs first, and in one in which rank 0 fails."""
    found = []
    for name in ("done", "failed"):
        try:
            with launch.main_process_first():
                found += [path.name for path in folder.glob(f"{name}-by-*")]
                (folder / f"{name}-by-{launch.rank()}").touch()
                if name == "failed":
                    raise InputError("wrong input")
        except InputError as error:
            found.append(str(error))
    return found


def everything(root: Path) -> dict[str, Any]:
    result = ragged_run(root / "whole")
    gradients_in_float32(root / "float32")
    result["interrupted"] = {name: interrupted_run(root / name, hear) for name, hear in INTERRUPTIONS.items()}
    result["resumed"] = resumed_run(root / RESUMED)
    result["first"] = first_and_others(root)
    result["others"] = other_objectives(root)
    result["refused"] = refused_first_step(root / "refused")
    return result
