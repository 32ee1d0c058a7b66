"""Runs that several processes and one are compared by, on steps that are uneven over two processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorafocal import launch
from lorafocal.model.load import load_base
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import lora, pairs, tiny_base, trainer

PAIRS, HELD_OUT, STEPS, FEW = 17, 5, 6, 4  # a step has eight pairs; every third has one, so that a rank has none
ZERO = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Case:
    """What a run trains, and how; `engines` with what only they are told."""

    engines: Mapping[str, Mapping[str, Any]]
    base: Callable[[Path], PreTrainedModel] = lambda root: tiny_base()
    settings: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Callable[[], LoraConfig] | None = None
    ref_model: Callable[[], PreTrainedModel] | None = None
    bound: float = 1e-5  # relative; some 1e-6 is seen


def plainly(*engines: str) -> dict[str, dict[str, Any]]:
    return {engine: {} for engine in engines}


def _tied(root: Path) -> PreTrainedModel:
    return tiny_base("mistral", tie_word_embeddings=True)


def _bf16(root: Path) -> PreTrainedModel:
    return tiny_base(dtype=torch.bfloat16)


def quantized(word: str) -> Callable[[Path], PreTrainedModel]:
    return lambda root: load_base(str(root / "base"), dtype="float32", quantization=word)


def _dora() -> LoraConfig:
    return lora(use_dora=True, modules_to_save=["lm_head"])


CASES = {
    "full, cached": Case(plainly(*ZERO, "fsdp2"), settings={"reference": "cached", "eval_strategy": "epoch"}),
    "full and tied, clipped, separate": Case(
        plainly("zero3", "fsdp2"),
        _tied,
        {"reference": "separate_model", "max_grad_norm": 0.05, "optim": "adamw_torch", "max_steps": FEW}
        | {"objective": "tdpo2"},  # of another head's weights, which are split too
        ref_model=tiny_base,
    ),
    "full, recomputed, offloaded": Case(
        {"zero2": {"offload": "optimizer"}, "zero3": {"offload": "all"}, "fsdp2": {"offload": "all"}},
        settings={"objective": "sft", "recompute": "full", "max_steps": FEW},
    ),
    "lora, live": Case(plainly("zero2", "zero3", "fsdp2"), settings={"eval_strategy": "epoch"}, peft_config=lora),
    "dora and head, frozen copy": Case(
        plainly("zero3", "fsdp2"),
        settings={"objective": "tdpo1", "reference": "frozen_copy", "max_steps": FEW},
        peft_config=_dora,
    ),
    "lora, live, whole distributions": Case(
        plainly("zero3", "fsdp2"), settings={"objective": "tdpo2", "max_steps": FEW}, peft_config=lora
    ),
    "lora on nf4": Case(plainly("zero3", "fsdp2"), quantized("nf4"), {"max_steps": FEW}, lora),
    "lora on int8": Case(plainly("zero2", "fsdp2"), quantized("int8"), {"max_steps": FEW}, lora),
    # ZeRO holds adapters in bf16 beside fp32 masters, FSDP2 in fp32 as one process does.
    "lora on bf16": Case(plainly("zero3", "fsdp2"), _bf16, {"max_steps": FEW}, lora, bound=2e-2),
}
MASTERS = Case({}, _bf16, {"reference": "cached", "learning_rate": 1e-7, "max_steps": 3})


def runs_of(*engines: str) -> list[tuple[str, str]]:
    """The names of the cases, with each of these engines that they are for."""
    return [(name, engine) for name, case in CASES.items() for engine in case.engines if engine in engines]


class Gradients:
    """Of every trained parameter at every step, before they are clipped."""

    def __init__(self, made: FocalPOTrainer) -> None:
        self.trainer, self._step = made, made.engine.step
        self.seen: dict[str, Tensor] = {}
        made.engine.step = self.step  # type: ignore[method-assign]

    def step(self) -> None:
        for name, parameter in self.trainer.trained.items():
            self.seen[f"{self.trainer.state.global_step + 1}/{name}"] = self.trainer.engine.full_gradient(parameter)
        self._step()


def make(root: Path, folder: Path, case: Case, engine: str | None, **more: Any) -> FocalPOTrainer:
    usual = {"max_steps": STEPS, "num_train_epochs": 4, "learning_rate": 1e-3, "tokens_per_pack": 40, "engine": engine}
    settings = usual | dict(case.settings) | dict(case.engines.get(str(engine), {})) | more
    if settings.get("reference") == "cached":
        settings["reference_store"] = str(folder / "references")
    for name in ("peft_config", "ref_model"):
        if maker := getattr(case, name):
            settings[name] = maker()
    made = trainer(folder, pairs(PAIRS), pairs(HELD_OUT, seed=2), model=case.base(root), **settings)
    if made.stored is not None:
        made.cache_reference(say=lambda _: None)
    return made


def losses(made: FocalPOTrainer, prefix: str = "") -> list[float]:
    return [line[f"{prefix}loss"] for line in made.state.log_history if f"{prefix}loss" in line]


def weights(made: FocalPOTrainer) -> dict[str, Tensor]:
    return {name: made.engine.full(parameter) for name, parameter in made.trained.items()}


def run(
    root: Path, folder: Path, case: Case, engine: str | None, held: Callable[[FocalPOTrainer], int] = lambda made: 0
) -> dict[str, Any]:
    """Train; rank 0 writes the gradients of every step into `folder`. What this process saw, and `held`."""
    made = make(root, folder, case, engine)
    gradients = Gradients(made)
    made.train()
    if launch.is_main():
        save_file(gradients.seen, folder / "gradients.safetensors")
    made.engine.rest()
    return {
        "wrapped": type(made.model_wrapped).__name__,
        "losses": losses(made),
        "evaluations": losses(made, "eval_"),
        "norms": [line["grad_norm"] for line in made.state.log_history if "grad_norm" in line],
        "elements": sum(value.numel() for value in weights(made).values()),
        "held": held(made),
        "whole": sum(parameter.numel() for parameter in made.model.parameters()),
    }


def masters(root: Path, engine: str) -> dict[str, Any]:
    """Full-parameter training in bf16 with a learning rate that bf16 weights would lose."""
    made = make(root, root / f"masters-{engine}", MASTERS, engine)
    before = {name: parameter.detach().float() for name, parameter in made.trained.items()}
    made.train()
    after = weights(made)
    return {
        "dtypes": sorted({str(value.dtype) for value in after.values()}),
        "still": [name for name, value in after.items() if torch.equal(value, before[name])],
        "far": max(float((value - before[name]).abs().max()) for name, value in after.items()),
        "losses": losses(made),
    }
