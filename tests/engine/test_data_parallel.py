"""Two processes train exactly what one does, on steps that do not divide evenly between them."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal.publish import sha256
from tests.engine import launches, ragged_run
from tests.engine.forked import both
from tests.engine.ragged_run import EPOCHS, HANGS_S, INTERRUPTIONS, OTHERS, PAIRS, RESUMED, STEPS
from tests.tiny import relative_difference

pytestmark = pytest.mark.engine

ADAPTER = "adapter/adapter_model.safetensors"
IN_FLOAT64 = 1e-9  # relative
IN_FLOAT32 = 1e-6
PER_EPOCH = STEPS // EPOCHS
TIMED = {"eval_runtime", "eval_samples_per_second", "pairs_per_s", "peak_gib"}
# Shares of pairs: an equal number of pairs on both sides, or they differ by more than rounding.
COUNTS = {"rewards/accuracies", "rewards/ties", "focal/turned_share", "pairs_seen", "epoch", "step"}


class Together(launches.Together):
    """Of ragged runs."""

    def ids_of(self, step: int) -> list[list[str]]:
        return [rank["steps"][step]["ids"] for rank in self.ranks]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    ended = both(ragged_run.everything, tmp_path_factory.mktemp("together"), waits_s=HANGS_S)
    return Together(ended.code, ended.output, ended.folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    seen = ragged_run.ragged_run(folder / "whole")
    ragged_run.gradients_in_float32(folder / "float32")
    refused = ragged_run.refused_first_step(folder / "refused")
    return seen | {"others": ragged_run.other_objectives(folder), "refused": refused}, folder


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
    assert [len(ids) for ids in together.ids_of(0)] == [4, 4]


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
    """Otherwise they wait for each other, and the time limit of their group ends them."""
    assert together.code == 0, together.output
    packs = [[step["packs"] for step in rank["steps"]] for rank in together.ranks]
    assert packs[0] == packs[1]
    own = [[bool(step["ids"]) for step in rank["steps"]] for rank in together.ranks]
    assert own[0] != own[1]


@pytest.mark.row("F1", "F3", "15")
def test_gradients_are_those_of_one_process_in_float32(together: Together, alone: tuple[dict[str, Any], Path]) -> None:
    ours, theirs = (load_file(folder / "float32/gradients.safetensors") for folder in (together.folder, alone[1]))
    for step in range(1, PER_EPOCH + 1):
        of_step = [{k: v for k, v in some.items() if k.startswith(f"{step}/")} for some in (ours, theirs)]
        assert len(of_step[0]) > 10
        assert all(tensor.dtype == torch.float32 for tensor in of_step[0].values())
        assert relative_difference(*of_step) < IN_FLOAT32


@pytest.mark.row("F1", "F5", "15", "20")
def test_losses_gradient_norms_and_evaluations_are_those_of_one_process(
    together: Together, alone: tuple[dict[str, Any], Path]
) -> None:
    ours, theirs = together.ranks[0]["logs"], alone[0]["logs"]
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for key in expected.keys() - TIMED:
            exact = key.removeprefix("eval_") in COUNTS
            assert line[key] == (expected[key] if exact else pytest.approx(expected[key], rel=IN_FLOAT64, abs=1e-15)), (
                key
            )
    evaluated = [line for line in ours if "eval_loss" in line]
    assert len(evaluated) == EPOCHS
    assert [line["pairs_seen"] for line in ours if "loss" in line] == [PAIRS, 2 * PAIRS]


@pytest.mark.parametrize("name", OTHERS)
def test_sums_over_the_step_and_scores_reach_the_pairs_of_all_ranks(
    together: Together, alone: tuple[dict[str, Any], Path], name: str
) -> None:
    ours, theirs = together.ranks[0]["others"][name], alone[0]["others"][name]
    assert len(ours) == len(theirs) == PER_EPOCH
    for line, expected in zip(ours, theirs, strict=True):
        for key in expected.keys() - TIMED:
            assert line[key] == pytest.approx(expected[key], rel=IN_FLOAT64, abs=1e-12), key
    assert ours[-1]["rewards/margins"] != pytest.approx(ours[0]["rewards/margins"], abs=1e-3)


@pytest.mark.row("64")
def test_every_rank_refuses_a_first_step_by_the_share_of_all_pairs(
    together: Together, alone: tuple[dict[str, Any], Path]
) -> None:
    assert "of the first step's pairs" in alone[0]["refused"]
    assert [rank["refused"] for rank in together.ranks] == [alone[0]["refused"]] * 2


@pytest.mark.row("16")
def test_what_is_logged_is_the_mean_over_the_pairs_of_all_ranks(together: Together) -> None:
    logs = [line for line in together.ranks[0]["logs"] if "loss" in line]
    for epoch, line in enumerate(logs):
        steps = range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        table = [loss for rank in together.ranks for step in steps for loss in rank["steps"][step]["losses"].values()]
        assert len(table) == PAIRS
        assert line["loss"] == pytest.approx(sum(table) / len(table), rel=1e-12)
        assert 0 <= line["rewards/accuracies"] <= 1
    assert [line["loss"] for line in logs] == [line["loss"] for line in together.ranks[1]["logs"] if "loss" in line]


@pytest.mark.row("F1", "F3")
def test_the_adapter_is_that_of_one_process(together: Together, alone: tuple[dict[str, Any], Path]) -> None:
    ours, theirs = (load_file(folder / "whole" / ADAPTER) for folder in (together.folder, alone[1]))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float64
        assert tensor.any()
        torch.testing.assert_close(ours[name], tensor, rtol=IN_FLOAT64, atol=1e-12)


@pytest.mark.parametrize("which", INTERRUPTIONS)
def test_a_signal_stops_all_ranks_after_the_same_step_with_one_checkpoint(together: Together, which: str) -> None:
    (at,) = set(INTERRUPTIONS[which].values())
    for rank in together.ranks:
        run = rank["interrupted"][which]
        assert (run["stopped_at"], run["signal"]) == (at, signal.SIGTERM)
        assert run["checkpoints"] == [f"checkpoint-{at}"]


@pytest.mark.row("55")
def test_interrupted_and_resumed_two_processes_end_with_the_same_bits_and_metrics(together: Together) -> None:
    assert sha256(together.folder / RESUMED / ADAPTER) == sha256(together.folder / "whole" / ADAPTER)
    for rank in together.ranks:
        ours, theirs = (
            [{key: value for key, value in line.items() if key not in TIMED} for line in logs if "loss" in line]
            for logs in (rank["resumed"]["logs"], rank["logs"])
        )
        assert len(ours) == len(theirs)
        for line, expected in zip(ours, theirs, strict=True):
            assert line == pytest.approx(expected, rel=1e-12)


def test_rank_0_goes_first_and_its_error_is_everybodys(together: Together) -> None:
    first, other = (rank["first"] for rank in together.ranks)
    assert first == ["wrong input"]
    assert other == ["done-by-0", "failed-by-0", "wrong input"]
