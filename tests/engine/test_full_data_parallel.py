"""Two processes train every weight exactly as one does, on steps that do not divide evenly between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.forked import forked_ranks
from tests.engine.full_run import RUNS, STEPS, all_runs
from tests.tiny import relative_difference

pytestmark = pytest.mark.engine

EXACT = {name: name != "sft, bf16" for name in RUNS}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")

    def work(rank: int) -> None:
        (folder / f"rank-{rank}.json").write_text(json.dumps(all_runs(folder)))

    assert forked_ranks(work, folder) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return all_runs(folder), folder


@pytest.fixture
def ranks(together: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(together.glob("rank-*.json"))]


@pytest.mark.parametrize("name", RUNS)
def test_losses_norms_and_evaluation_are_those_of_one_process(ranks, alone, name) -> None:
    assert [rank[name]["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * 2
    tolerance = 1e-6 if EXACT[name] else 2e-2
    for rank in ranks:
        assert len(rank[name]["losses"]) == STEPS
        for key in ("losses", "norms", "eval_loss"):
            assert rank[name][key] == pytest.approx(alone[0][name][key], rel=tolerance), key


@pytest.mark.row("15", "F3", "F4")
@pytest.mark.parametrize("name", RUNS)
def test_gradients_of_every_step_and_the_weights_at_the_end_are_those_of_one_process(together, alone, name) -> None:
    gradients, weights = (
        [load_file(root / name / f"{what}.safetensors") for root in (together, alone[1])]
        for what in ("gradients", "weights")
    )
    assert len({key.partition("/")[0] for key in gradients[0]}) == STEPS
    assert relative_difference(*gradients) < (1e-5 if EXACT[name] else 5e-2)
    assert relative_difference(*weights) < (1e-6 if EXACT[name] else 1e-2)
