"""Runs under FSDP2 whose steps are uneven over two processes: each of them runs all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lorafocal.errors import InputError
from lorafocal.trainer import FocalPOTrainer
from tests.engine.compared_runs import CASES, Case, losses, make, masters, run, runs_of, weights
from tests.tiny import with_a_wide_norm


def held(made: FocalPOTrainer) -> int:
    """Entries of the parts that this process holds."""
    return sum(p.to_local().numel() for p in made.trained.values() if isinstance(p, DTensor))


def started_again(root: Path) -> dict[str, Any]:
    """A run, an evaluation, every weight and state as they were at the start, and the run once more."""
    made = make(root, root / "again", CASES["full, cached"], "fsdp2", max_steps=3, eval_strategy="no")
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


def refusals(root: Path) -> list[str]:
    """What FSDP2 says of optimisers that it cannot step, of a model that is split already, and of two precisions."""
    with pytest.raises(InputError) as of_bitsandbytes:
        make(root, root / "refused", CASES["full, cached"], "fsdp2", optim="adamw_8bit")
    made = make(root, root / "refused", CASES["full, cached"], "fsdp2")
    made.optimizer = torch.optim.SGD(made.trained.values())
    with pytest.raises(InputError) as brought:
        made.train()
    made.optimizer = None
    made.engine.begin(made)
    with pytest.raises(InputError) as twice:
        made.engine.place(made.model, made.args.device)
    with pytest.raises(InputError) as wide:
        make(root, root / "refused", Case({}, with_a_wide_norm, {"objective": "sft"}), "fsdp2")
    return [str(error.value) for error in (of_bitsandbytes, brought, twice, wide)]


def everything(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {name: run(root, root / name, CASES[name], "fsdp2", held) for name, _ in runs_of("fsdp2")}
    return result | {"again": started_again(root), "masters": masters(root, "fsdp2"), "refusals": refusals(root)}
