"""Runs under DeepSpeed ZeRO on steps that are uneven over two processes; one of them is started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback

from lorafocal import launch
from lorafocal.engines import zero
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.trainer import FocalPOTrainer
from tests.engine.compared_runs import (
    CASES,
    MASTERS,
    STEPS,
    ZERO,
    Case,
    make,
    masters,
    quantized,
    run,
    runs_of,
    weights,
)
from tests.engine.ragged_run import HANGS_S
from tests.tiny import lora, tiny_base, with_a_wide_norm

KILLED_IN, LAST = 3, 4  # steps of the run that loses a rank


def held(made: FocalPOTrainer) -> int:
    """Masters that this process holds."""
    return sum(part.masters.numel() for part in made.engine._parts)  # type: ignore[attr-defined]


def states(made: FocalPOTrainer) -> dict[str, dict[str, Any]]:
    return {name: made.engine.states(parameter) for name, parameter in made.trained.items()}


def restored(root: Path) -> dict[str, list[bool]]:
    """Weights and states of a zero3 run, set in every other engine and precision, and read again."""
    done = make(root, root / "source", CASES["full, cached"], "zero3", max_steps=2, eval_strategy="no")
    done.train()
    values, saved = weights(done), states(done)
    found = {}
    for engine in (*ZERO, None):
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
    for cell in (Case({}, quantized("int8"), peft_config=lora), tokens):
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


def everything(root: Path) -> dict[str, Any]:
    zero.PERSISTENT_ENTRIES = 0  # tiny weights would all stay whole
    result: dict[str, Any] = {
        f"{name} {engine}": run(root, root / f"{name} {engine}", CASES[name], engine, held)
        for name, engine in runs_of(*ZERO)
    }
    for what in (masters, unhealthy):
        result[what.__name__] = {engine: what(root, engine) for engine in ZERO}
    return result | {"restored": restored(root), "refusals": refusals(root)}


if __name__ == "__main__":
    zero.PERSISTENT_ENTRIES = 0
    dist.init_process_group("gloo", timeout=timedelta(seconds=4 * HANGS_S))
    killed(Path(sys.argv[1]))
    launch.shutdown()
