"""`--tiny` takes every full-parameter recipe from its file to a model that scores as the run did, under ZeRO-3."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafocal.rehearsal.stage import joined_by
from tests.engine import launches
from tests.engine.forked import both
from tests.engine.paper_rehearsals import PAPER, rehearsed
from tests.test_rehearsal import described

pytestmark = pytest.mark.engine

README = (launches.REPOSITORY / "README.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^lorafocal train (configs/paper/\S+ --tiny .+?) +#", README, re.MULTILINE)
RECIPES = sorted({path.stem for path in PAPER.glob("*.yaml")} - {"released", "results"})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each rehearsal said, all of them in two processes."""
    first, other = both(lambda _: rehearsed(RECIPES), tmp_path_factory.mktemp("found"), waits_s=60).ranks
    assert other == {}
    return first


def test_every_recipe_of_all_parameters_trains_saves_and_loads(found: dict[str, dict[str, Any]]) -> None:
    assert sorted(found) == RECIPES
    assert len(RECIPES) == 14
    for name, rehearsal in found.items():
        assert rehearsal["made"] == "model", name
        assert "the saved model, loaded again, scores 4 held-out pairs as the run did" in rehearsal["said"], name
        assert "1 checkpoint" in rehearsal["said"], name


def test_the_readmes_command(tmp_path: Path) -> None:
    """Two processes, one voice, nothing kept; the loss of step 0 is FocalPO's where policy and reference agree."""
    code, output = launches.run(
        ["lorafocal", "train", *COMMAND.split()], cwd=str(launches.REPOSITORY), TMPDIR=str(tmp_path)
    )
    assert code == 0, output
    assert output.count("this config runs") == 1
    assert "loss 0.669536 at the first" in output
    assert "Traceback" not in output
    assert list(tmp_path.glob("lorafocal-*")) == []


def test_processes_join_as_those_of_the_run_do() -> None:
    """Once joined they stay so: FSDP2 that offloads clips on the CPU, and through NCCL alone nobody answers there."""
    full: dict[str, Any] = {"adapter": None, "reference": {"kind": "cached"}, "training__ddp_timeout": 7200}
    config = described(engine={"kind": "fsdp2", "offload": "all"}, training__use_cpu=True, **full)
    assert joined_by(config) == {"engine": "fsdp2", "offload": "all", "ddp_timeout": 7200, "use_cpu": True}
    assert joined_by(described(training__use_cpu=True)) == {"use_cpu": True}
