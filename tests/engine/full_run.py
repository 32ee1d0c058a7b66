"""Every weight trained, without an adapter, on steps uneven over two processes: in each of them, or in one alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorafocal import launch
from lorafocal.data.tokens import TokenizedPair
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import pairs, tiny_base, trainer

PAIRS, PAIRS_PER_STEP, STEPS = 13, 6, 3  # the last step has one pair: a rank has none, and runs fillers
RUNS: dict[str, dict[str, Any]] = {
    "focalpo, separate": {"reference": "separate_model", "identity_probe": True},
    "kto, cached": {"objective": "kto", "reference": "cached"},
    "odpo, tied": {"objective": "odpo", "reference": "separate_model", "tied": True},
    "sft, bf16": {"objective": "sft", "dtype": torch.bfloat16},
}


def scored(count: int, seed: int) -> list[TokenizedPair]:
    made = pairs(count, seed=seed)
    return [replace(pair, score_chosen=2.0 + place, score_rejected=1.0) for place, pair in enumerate(made)]


def make(folder: Path, *, dtype: torch.dtype = torch.float64, tied: bool = False, **settings: Any) -> FocalPOTrainer:
    model = tiny_base(dtype=dtype, tie_word_embeddings=tied)
    if settings.get("reference") == "separate_model":
        settings["ref_model"] = tiny_base(dtype=dtype, tie_word_embeddings=tied)
    elif settings.get("reference") == "cached":
        settings["reference_store"] = str(folder / "store")
    how: dict[str, Any] = {"pairs_per_step": PAIRS_PER_STEP, "num_train_epochs": 1, "max_steps": -1}
    how |= {"tokens_per_pack": 40, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    return trainer(folder, scored(PAIRS, 1), scored(5, 2), model=model, **(how | settings))


def record(folder: Path, **settings: Any) -> dict[str, Any]:
    """Train; every step's gradients, as the engine says them before the step, and the weights at the end."""
    run = make(folder, **settings)
    if run.args.reference == "cached":
        run.cache_reference()
    gradients: dict[str, torch.Tensor] = {}
    step = run.engine.step

    def recorded() -> None:
        number = run.state.global_step + 1
        gradients.update({f"{number}/{name}": run.engine.full_gradient(p) for name, p in run.trained.items()})
        step()

    run.engine.step = recorded  # type: ignore[method-assign]
    run.train()
    held_out = run.evaluate()
    ended = {name: run.engine.full(parameter) for name, parameter in run.trained.items()}
    if launch.is_main():
        save_file(gradients, folder / "gradients.safetensors")
        save_file(ended, folder / "weights.safetensors")
    return {
        "wrapped": type(run.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry],
        "eval_loss": held_out["eval_loss"],
    }


def all_runs(root: Path) -> dict[str, Any]:
    return {name: record(root / name, **settings) for name, settings in RUNS.items()}
