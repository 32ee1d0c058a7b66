"""Runs under FSDP2 whose steps are uneven over two processes: started by torchrun, or called alone for one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lorafocal import launch
from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.trainer import FocalPOTrainer
from tests.engine.ragged_run import HANGS_S
from tests.tiny import lora, pairs, tiny_base, trainer, with_a_wide_norm

PAIRS, HELD_OUT, STEPS, FEW = 17, 5, 10, 4  # a step has eight pairs; every third has one, so that a rank has none


@dataclass(frozen=True)
class Case:
    """What a run trains, and how; `split` is what it is told under FSDP2 alone."""

    base: Callable[[Path], PreTrainedModel]
    settings: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Callable[[], LoraConfig] | None = None
    ref_model: Callable[[], PreTrainedModel] | None = None
    split: Mapping[str, Any] = field(default_factory=dict)


def _float32(root: Path) -> PreTrainedModel:
    return tiny_base()


def _tied(root: Path) -> PreTrainedModel:
    return tiny_base("mistral", tie_word_embeddings=True)


def _bf16(root: Path) -> PreTrainedModel:
    return tiny_base(dtype=torch.bfloat16)


def _quantized(word: str) -> Callable[[Path], PreTrainedModel]:
    return lambda root: load_base(str(root / "base"), dtype="float32", quantization=word)


def _dora() -> LoraConfig:
    return lora(use_dora=True, modules_to_save=["lm_head"])


CASES = {
    "full, cached": Case(_float32, {"reference": "cached", "eval_strategy": "epoch"}),
    "full and tied, separate": Case(
        _tied,
        {"reference": "separate_model", "max_grad_norm": 0.05, "optim": "adamw_torch", "max_steps": FEW},
        ref_model=tiny_base,
    ),
    "full, recomputed, offloaded": Case(
        _float32, {"objective": "sft", "recompute": "full", "max_steps": FEW}, split={"offload": "all"}
    ),
    "lora, live": Case(_float32, {"eval_strategy": "epoch"}, lora),
    "dora and head, frozen copy": Case(_float32, {"reference": "frozen_copy", "max_steps": FEW}, _dora),
    "lora on nf4": Case(_quantized("nf4"), {"max_steps": FEW}, lora),
    "lora on int8": Case(_quantized("int8"), {"max_steps": FEW}, lora),
    "lora on bf16": Case(_bf16, {"max_steps": FEW}, lora),
}
MASTERS = Case(_bf16, {"reference": "cached", "learning_rate": 1e-7, "max_steps": 3})


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


def make(root: Path, folder: Path, case: Case, *, split: bool, **more: Any) -> FocalPOTrainer:
    usual = {"max_steps": STEPS, "num_train_epochs": 4, "learning_rate": 1e-3, "tokens_per_pack": 40}
    settings = usual | dict(case.settings) | ({"engine": "fsdp2", **case.split} if split else {}) | more
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


def run(root: Path, folder: Path, case: Case, *, split: bool) -> dict[str, Any]:
    """Train; rank 0 writes the gradients of every step into `folder`. What this process saw."""
    made = make(root, folder, case, split=split)
    gradients = Gradients(made)
    made.train()
    parts = [p.to_local().numel() for p in made.trained.values() if isinstance(p, DTensor)]
    if launch.is_main():
        save_file(gradients.seen, folder / "gradients.safetensors")
    return {
        "wrapped": type(made.model_wrapped).__name__,
        "losses": losses(made),
        "evaluations": losses(made, "eval_"),
        "norms": [line["grad_norm"] for line in made.state.log_history if "grad_norm" in line],
        "elements": sum(parameter.numel() for parameter in made.trained.values()),
        "held": sum(parts),
    }


def started_again(root: Path) -> dict[str, Any]:
    """A run, an evaluation, every weight and state as they were at the start, and the run once more."""
    made = make(root, root / "again", CASES["full, cached"], split=True, max_steps=3, eval_strategy="no")
    before = {name: parameter.detach().clone() for name, parameter in made.trained.items()}
    result = {"at the start": made.evaluate()["eval_loss"]}
    made.train()
    states = {name: made.engine.states(parameter) for name, parameter in made.trained.items()}
    result["shapes"] = all(state["exp_avg"].shape == before[name].shape for name, state in states.items())
    result["trained"] = made.evaluate()["eval_loss"]
    made.engine.restore(made.trained, lambda name: before[name], lambda name: states[name])
    result["restored"] = all(
        torch.equal(value, states[name][key])
        for name, parameter in made.trained.items()
        for key, value in made.engine.states(parameter).items()
    ) and all(torch.equal(value, before[name]) for name, value in weights(made).items())
    result["at the start again"] = made.evaluate()["eval_loss"]
    made.engine.restore(made.trained, lambda name: before[name], lambda name: {})
    first = losses(made)
    made.train()
    return result | {"first": first, "second": losses(made)}


def masters(root: Path) -> dict[str, Any]:
    """Full-parameter training in bf16 with a learning rate that bf16 weights would lose."""
    made = make(root, root / "masters", MASTERS, split=True)
    before = {name: parameter.detach().float() for name, parameter in made.trained.items()}
    made.train()
    after = weights(made)
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    far = max(float((value - before[name]).abs().max()) for name, value in after.items())
    return {
        "dtypes": sorted({str(v.dtype) for v in after.values()}),
        "still": still,
        "far": far,
        "losses": losses(made),
    }


def refusals(root: Path) -> list[str]:
    """What FSDP2 says of optimisers that it cannot step, of a model that is split already, and of two precisions."""
    with pytest.raises(InputError) as of_bitsandbytes:
        make(root, root / "refused", CASES["full, cached"], split=True, optim="adamw_8bit")
    made = make(root, root / "refused", CASES["full, cached"], split=True)
    made.optimizer = torch.optim.SGD(made.trained.values())
    with pytest.raises(InputError) as brought:
        made.train()
    made.optimizer = None
    made.engine.begin(made)
    with pytest.raises(InputError) as twice:
        made.engine.place(made.model, made.args.device)
    with pytest.raises(InputError) as wide:
        make(root, root / "refused", Case(with_a_wide_norm, {"objective": "sft"}), split=True)
    return [str(error.value) for error in (of_bitsandbytes, brought, twice, wide)]


def main(root: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS_S))
    result: dict[str, Any] = {name: run(root, root / name, case, split=True) for name, case in CASES.items()}
    result |= {"again": started_again(root), "masters": masters(root), "refusals": refusals(root)}
    (root / f"rank-{launch.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    launch.shutdown()
