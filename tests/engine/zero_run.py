"""Runs under DeepSpeed ZeRO on steps that are uneven over two processes: started by torchrun, or called for one."""

from __future__ import annotations

import json
import os
import signal
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
from transformers import PreTrainedModel, TrainerCallback

from lorafocal import launch
from lorafocal.engines import zero
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.model.load import load_base
from lorafocal.trainer import FocalPOTrainer
from tests.engine.ragged_run import HANGS_S
from tests.tiny import lora, pairs, tiny_base, trainer, with_a_wide_norm

PAIRS, HELD_OUT, STEPS = 17, 5, 10  # a step has eight pairs; every third has one, so that a rank has none
STAGES = ("zero1", "zero2", "zero3")
KILLED_IN, LAST = 3, 4  # steps of the run that loses a rank


@dataclass(frozen=True)
class Case:
    """What a run trains, and how; `engines` with what only they are told."""

    engines: Mapping[str, Mapping[str, Any]]
    base: Callable[[Path], PreTrainedModel] = lambda root: tiny_base()
    settings: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Callable[[], LoraConfig] | None = None
    ref_model: Callable[[], PreTrainedModel] | None = None
    bound: float = 1e-5  # relative; some 1e-6 is seen


def _tied(root: Path) -> PreTrainedModel:
    return tiny_base("mistral", tie_word_embeddings=True)


def _bf16(root: Path) -> PreTrainedModel:
    return tiny_base(dtype=torch.bfloat16)


def _quantized(word: str) -> Callable[[Path], PreTrainedModel]:
    return lambda root: load_base(str(root / "base"), dtype="float32", quantization=word)


def _dora() -> LoraConfig:
    return lora(use_dora=True, modules_to_save=["lm_head"])


CASES = {
    "full, cached": Case({stage: {} for stage in STAGES}, settings={"reference": "cached", "eval_strategy": "epoch"}),
    "full and tied, clipped, separate": Case(
        {"zero3": {}}, _tied, {"reference": "separate_model", "max_grad_norm": 0.05}, ref_model=tiny_base
    ),
    "full, recomputed, offloaded": Case(
        {"zero2": {"offload": "optimizer"}, "zero3": {"offload": "all"}},
        settings={"objective": "sft", "recompute": "full", "max_steps": 4},
    ),
    "lora, live": Case({"zero2": {}, "zero3": {}}, settings={"eval_strategy": "epoch"}, peft_config=lora),
    "dora and head, frozen copy": Case({"zero3": {}}, settings={"reference": "frozen_copy"}, peft_config=_dora),
    "lora on nf4": Case({"zero2": {}, "zero3": {}}, _quantized("nf4"), {"max_steps": 4}, lora),
    "lora on int8": Case({"zero2": {}}, _quantized("int8"), {"max_steps": 4}, lora),
    "lora on bf16": Case({"zero3": {}}, _bf16, {"max_steps": 4}, lora, bound=2e-2),
}
MASTERS = Case({}, _bf16, {"reference": "cached", "learning_rate": 1e-7, "max_steps": 3})
RUNS = [(name, engine) for name, case in CASES.items() for engine in case.engines]


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


def weights(made: FocalPOTrainer) -> dict[str, Tensor]:
    return {name: made.engine.full(parameter) for name, parameter in made.trained.items()}


def states(made: FocalPOTrainer) -> dict[str, dict[str, Any]]:
    return {name: made.engine.states(parameter) for name, parameter in made.trained.items()}


def run(root: Path, folder: Path, case: Case, engine: str | None) -> dict[str, Any]:
    """Train; rank 0 writes the gradients of every step into `folder`. What this process saw."""
    made = make(root, folder, case, engine)
    gradients = Gradients(made)
    made.train()
    if launch.is_main():
        save_file(gradients.seen, folder / "gradients.safetensors")
    log = made.state.log_history
    made.engine.rest()
    return {
        "wrapped": type(made.model_wrapped).__name__,
        "losses": [line["loss"] for line in log if "loss" in line],
        "evaluations": [line["eval_loss"] for line in log if "eval_loss" in line],
        "norms": [line["grad_norm"] for line in log if "grad_norm" in line],
        "elements": sum(value.numel() for value in weights(made).values()),
        "held": sum(part.masters.numel() for part in made.engine._parts) if engine else 0,  # type: ignore[attr-defined]
        "whole": sum(parameter.numel() for parameter in made.model.parameters()),
    }


def restored(root: Path) -> dict[str, list[bool]]:
    """Weights and states of a zero3 run, set in every other engine and precision, and read again."""
    done = make(root, root / "source", CASES["full, cached"], "zero3", max_steps=2, eval_strategy="no")
    done.train()
    values, saved = weights(done), states(done)
    found = {}
    for engine in (*STAGES, None):
        for precision, case in (("float32", CASES["full, cached"]), ("bfloat16", MASTERS)):
            made = make(root, root / "target", case, engine, eval_strategy="no")
            made.engine.begin(made)
            made._prepare_for_training(STEPS, None, None)
            fresh = not any(states(made).values())
            made.engine.restore(made.trained, values.__getitem__, saved.__getitem__)
            same = all(torch.equal(value, values[name]) for name, value in weights(made).items())
            for name, state in states(made).items():
                same = same and state.keys() == saved[name].keys()
                same = same and all(torch.equal(value, saved[name][key]) for key, value in state.items())
            found[f"{engine} {precision}"] = [fresh, same]
    return found


def masters(root: Path, engine: str) -> dict[str, Any]:
    """Full-parameter training in bf16 with a learning rate that bf16 weights would lose."""
    made = make(root, root / f"masters-{engine}", MASTERS, engine)
    before = {name: parameter.detach().float() for name, parameter in made.trained.items()}
    made.train()
    after = weights(made)
    return {
        "still": [name for name, value in after.items() if torch.equal(value, before[name])],
        "far": max(float((value - before[name]).abs().max()) for name, value in after.items()),
        "losses": [line["loss"] for line in made.state.log_history if "loss" in line],
    }


def with_an_idle_weight(root: Path) -> PreTrainedModel:
    model = tiny_base()
    model.model.idle = torch.nn.Parameter(torch.ones(3))  # two processes do not divide it evenly
    return model


def unhealthy(root: Path, engine: str) -> list[str]:
    """What is said of a weight without gradient, and of a gradient that is not finite on one rank."""
    said = []
    for name, base in (("idle", with_an_idle_weight), ("infinite", CASES["full, cached"].base)):
        case = Case({}, base, {"reference": "cached", "max_steps": 2})
        made = make(root, root / f"{name}-{engine}", case, engine)
        if name == "infinite" and launch.rank() == 1:
            next(iter(made.trained.values())).register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(UnhealthyRun) as error:
            made.train()
        said.append(str(error.value))
    return said


def refusals(root: Path) -> list[str]:
    """What ZeRO says of optimisers that it cannot step, of a second training, and of what it cannot hold."""
    case = Case({}, settings={"objective": "sft", "max_steps": 1})
    with pytest.raises(InputError) as of_bitsandbytes:
        make(root, root / "refused", case, "zero2", optim="adamw_8bit")
    made = make(root, root / "refused", case, "zero2")
    made.optimizer = torch.optim.SGD(made.trained.values())
    with pytest.raises(InputError) as brought:
        made.train()
    made.optimizer = None
    made.train()
    with pytest.raises(InputError) as again:
        made.train()
    with pytest.raises(InputError) as wide:
        make(root, root / "refused", Case({}, with_a_wide_norm, {"objective": "sft"}), "zero1")
    said = [str(error.value) for error in (of_bitsandbytes, brought, again, wide)]
    tokens = Case({}, peft_config=lambda: lora(trainable_token_indices=[3]))
    for cell in (Case({}, _quantized("int8"), peft_config=lora), tokens):
        with pytest.raises(InputError) as not_split:
            make(root, root / "refused", cell, "zero3")
        said.append(str(not_split.value))
    return said


class KillSelf(TrainerCallback):
    """SIGKILL for rank 1, within a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if launch.rank() == 1 and state.global_step + 1 == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(root: Path, name: str) -> FocalPOTrainer:
    case = Case({}, settings={"reference": "cached", "max_steps": LAST, "save_strategy": "steps", "save_steps": 1})
    return make(root, root / name, case, "zero3")


def killed(root: Path) -> None:
    made = saving(root, "killed")
    made.add_callback(KillSelf())
    made.train()


def resumed(root: Path) -> None:
    for name in ("killed", "whole"):
        made = saving(root, name)
        made.train(resume_from_checkpoint=name == "killed")
        values = weights(made)
        if launch.is_main():
            save_file(values, root / f"{name}.safetensors")


def everything(root: Path) -> None:
    result: dict[str, Any] = {
        f"{name} {engine}": run(root, root / f"{name} {engine}", CASES[name], engine) for name, engine in RUNS
    }
    for what in (masters, unhealthy):
        result[what.__name__] = {engine: what(root, engine) for engine in STAGES}
    result |= {"restored": restored(root), "refusals": refusals(root)}
    (root / f"rank-{launch.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    zero.PERSISTENT_ENTRIES = 0  # tiny weights would all stay whole
    dist.init_process_group("gloo", timeout=timedelta(seconds=4 * HANGS_S))
    {"everything": everything, "killed": killed, "resumed": resumed}[sys.argv[1]](Path(sys.argv[2]))
    launch.shutdown()
