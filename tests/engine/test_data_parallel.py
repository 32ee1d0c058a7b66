"""Two processes train exactly what one does, on steps that do not divide evenly between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal.publish import sha256
from tests.engine import ragged_run
from tests.engine.ragged_run import EPOCHS, PAIRS, PAIRS_PER_STEP, STEPS

pytestmark = pytest.mark.engine

REPOSITORY = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
IN_FLOAT64 = 1e-9  # relative
PER_EPOCH = STEPS // EPOCHS


@dataclass(frozen=True)
class Together:
    """What two processes left: their exit code, what each saw, and their folder."""

    code: int
    output: str
    folder: Path

    @property
    def ranks(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("rank-*.json"))]

    def ids_of(self, step: int) -> list[list[str]]:
        return [rank["steps"][step]["ids"] for rank in self.ranks]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(REPOSITORY))))
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ragged_run.__file__, str(folder)],
        env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    return Together(ended.returncode, ended.stdout, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return ragged_run.ragged_run(folder), folder


@pytest.mark.row("F7", "F8")
def test_there_really_are_two_and_they_end_in_order(together: Together, alone: tuple[dict[str, Any], Path]) -> None:
    assert together.code == 0, together.output
    assert [(rank["world"], rank["engine"]) for rank in together.ranks] == [(2, "DistributedDataParallel")] * 2
    assert alone[0]["world"] == 1
    assert alone[0]["engine"] != "DistributedDataParallel"


@pytest.mark.row("F1")
def test_every_pair_is_seen_once_an_epoch_and_in_the_step_it_would_be_alone(
    together: Together, alone: tuple[dict[str, Any], Path]
) -> None:
    for step in range(STEPS):
        shares = together.ids_of(step)
        assert sorted(shares[0] + shares[1]) == sorted(alone[0]["steps"][step]["ids"])
    for epoch in range(EPOCHS):
        seen = Counter(i for step in range(PER_EPOCH) for ids in together.ids_of(epoch * PER_EPOCH + step) for i in ids)
        assert seen == Counter(f"pair-{n}" for n in range(PAIRS))
    assert [len(ids) for ids in together.ids_of(PER_EPOCH - 1)] == [1, 0]  # a rank without a pair
    assert [len(ids) for ids in together.ids_of(0)] == [3, 2]


@pytest.mark.row("F2")
def test_epochs_differ(together: Together) -> None:
    first, second = (set(together.ids_of(step)[0]) for step in (0, PER_EPOCH))
    assert first != second


@pytest.mark.row("F3")
def test_gradients_are_exchanged_once_and_the_optimiser_steps_once_a_step(together: Together) -> None:
    for rank in together.ranks:
        for step in rank["steps"]:
            assert (step["reductions"], step["optimizer_steps"]) == (1, 1)
            assert step["flags"] == [False] * (step["packs"] - 1) + [True]
    assert max(step["packs"] for step in together.ranks[0]["steps"]) >= 2


@pytest.mark.row("F4")
def test_ranks_run_as_many_packs_as_each_other(together: Together) -> None:
    packs = [[step["packs"] for step in rank["steps"]] for rank in together.ranks]
    assert packs[0] == packs[1]


@pytest.mark.row("F1", "F5", "15", "20")
def test_losses_gradient_norms_and_evaluations_are_those_of_one_process(
    together: Together, alone: tuple[dict[str, Any], Path]
) -> None:
    ours, theirs = together.ranks[0]["logs"], alone[0]["logs"]
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for key in expected.keys() - {"eval_runtime", "eval_samples_per_second"}:
            assert line[key] == pytest.approx(expected[key], rel=IN_FLOAT64, abs=1e-15), key
    evaluated = [line for line in ours if "eval_loss" in line]
    assert len(evaluated) == EPOCHS
    counted = [line["pairs_seen"] for line in ours if "loss" in line]
    assert counted == [2 * PAIRS_PER_STEP, PAIRS, PAIRS + 2 * PAIRS_PER_STEP, 2 * PAIRS]


@pytest.mark.row("F1", "F3")
def test_the_adapter_is_that_of_one_process(together: Together, alone: tuple[dict[str, Any], Path]) -> None:
    ours, theirs = load_file(together.folder / "whole" / ADAPTER), load_file(alone[1] / ADAPTER)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float64
        assert tensor.any()
        torch.testing.assert_close(ours[name], tensor, rtol=IN_FLOAT64, atol=1e-12)


@pytest.mark.row("55")
def test_stopped_and_resumed_two_processes_end_with_the_same_bits_and_metrics(together: Together) -> None:
    assert sha256(together.folder / "resumed" / ADAPTER) == sha256(together.folder / "whole" / ADAPTER)
    for rank in together.ranks:
        ours, theirs = ([line for line in logs if "loss" in line] for logs in (rank["resumed"]["logs"], rank["logs"]))
        assert len(ours) == len(theirs)
        for line, expected in zip(ours, theirs, strict=True):
            assert line == pytest.approx(expected, rel=1e-12)
