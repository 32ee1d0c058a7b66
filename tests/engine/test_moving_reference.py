"""A reference that moves is the same on every rank and as in one process; finished adapters split as the base does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.model.adapters import attach_lora
from lorafocal.model.moving import reference_state
from tests.engine.forked import forked_ranks
from tests.engine.ragged_run import make
from tests.tiny import disturb, lora, tiny_base

pytestmark = pytest.mark.engine

MOVING = {"reference": "moving", "reference_every": 1, "reference_mixing": 0.5}


def run_of(folder: Path, **settings: Any) -> dict[str, Any]:
    made = make(folder, **settings)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    if settings["reference"] != "moving":
        return {"losses": losses, "norms": {}}
    state = reference_state(made.model)
    return {"losses": losses, "norms": {name: float(tensor.double().norm()) for name, tensor in state.items()}}


def together(root: Path, **settings: Any) -> list[dict[str, Any]]:
    root.mkdir()

    def work(rank: int) -> None:
        (root / f"rank-{rank}.json").write_text(json.dumps(run_of(root / "run", **settings)))

    assert forked_ranks(work, root) == [0, 0]
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_move_one_reference(tmp_path: Path, engine: str) -> None:
    ranks = together(tmp_path / "together", **MOVING, engine=engine)
    one = run_of(tmp_path / "alone", **MOVING)
    assert ranks[0]["norms"] == ranks[1]["norms"]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    b = [name for name in one["norms"] if ".lora_B." in name]
    assert [ranks[0]["norms"][name] for name in b] == pytest.approx([one["norms"][name] for name in b], rel=1e-3)


def test_finished_adapters_are_split_with_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "finished"
    disturb(attach_lora(tiny_base(), lora(r=6, target_modules=["q_proj", "up_proj"])), 0.2).save_pretrained(folder)
    settings = {"reference": "several", "reference_members": ["base", str(folder)]}
    ranks = together(tmp_path / "together", **settings, engine="fsdp2")
    one = run_of(tmp_path / "alone", **settings)
    assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)
