"""`lorafocal sweep`, trained: every point is an ordinary run, and the same call goes on."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafocal.reference
from lorafocal import run
from lorafocal.config import load_config
from lorafocal.publish import sha256
from lorafocal.report.sweep_page import SweepReport
from lorafocal.report.sweep_results import LOSS
from lorafocal.report.write import write_report
from lorafocal.run import RunSummary
from lorafocal.sweep import sweep
from lorafocal.trainer import FocalPOTrainer
from tests.test_sweep import SEEDS, STEPS, states, sweeper, write_config
from tests.toy_run import metric_lines, write_inputs

pytestmark = pytest.mark.engine
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    return write_config(root, "run.yaml")


@pytest.fixture
def swept(config: Path, tmp_path: Path) -> Callable[..., SweepReport]:
    return sweeper(config, tmp_path)


@pytest.fixture(scope="module")
def finished(config: Path, root: Path) -> SweepReport:
    """Two rates, of which one moves nothing, with two seeds each."""
    grid = ["training.learning_rate=1e-2,1e-60", SEEDS]
    return sweep(config, grid, runs_dir=root / "runs", quiet=True)


@pytest.mark.row("57")
def test_a_point_is_the_run_that_train_gives(finished: SweepReport, config: Path, tmp_path: Path) -> None:
    alone = run.train(load_config(config, ["training.learning_rate=1e-2", "training.seed=2"]), runs_dir=tmp_path)
    folder = finished.record.folder / "lr0.01-seed2"
    assert sha256(alone.folder / ADAPTER) == sha256(folder / ADAPTER)
    assert metric_lines(folder, key="eval_loss")[-1][LOSS] == finished.record.points[1].held_out[LOSS]
    resolved = load_config(folder / "config.yaml")
    assert run.train(resolved, resume=True, quiet=True, runs_dir=folder.parent).steps == STEPS
    assert write_report([folder], tmp_path / "report").page.exists()


def test_a_run_that_fails_is_recorded_with_its_reason_and_the_others_go_on(finished: SweepReport) -> None:
    assert list(states(finished).values()) == ["finished", "finished", "failed", "failed"]
    assert "no trained weight moved at step 1" in finished.record.points[2].reason
    assert finished.choice is not None
    assert finished.choice.setting.values == {"training.learning_rate": 1e-2}


def test_what_failed_is_not_tried_again_until_its_folder_is_gone(
    finished: SweepReport, config: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(run, "train", lambda config, **options: asked.append(config.name))
    grid = ["training.learning_rate=1e-2,1e-60", SEEDS]
    again = sweep(config, grid, runs_dir=root / "runs", quiet=True)
    assert asked == []
    assert again.as_dict() == finished.as_dict()


def test_a_sweep_leaves_its_table_page_and_picture(finished: SweepReport) -> None:
    folder = finished.record.folder
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "sweep.json", "sweep.csv", "sweep.html", "sweep.png",
    }  # fmt: skip
    assert str(folder) not in (folder / "sweep.csv").read_text()
    assert finished.page == folder / "sweep.html"


def signalled(monkeypatch: pytest.MonkeyPatch, *, run_number: int, step: int) -> None:
    """A signal in one step of one run of this process."""
    original, begun = FocalPOTrainer.training_step, [0]

    def step_and_signal(self: FocalPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        begun[0] += self.state.global_step == 0
        if (begun[0], self.state.global_step) == (run_number, step):
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FocalPOTrainer, "training_step", step_and_signal)


def test_a_signal_stops_after_the_step_and_the_same_call_goes_on(
    finished: SweepReport, swept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("training.learning_rate=1e-2", SEEDS)
    with monkeypatch.context() as patched:
        signalled(patched, run_number=2, step=1)
        stopped = swept(*grid)
    assert stopped.interrupted_by == signal.SIGTERM
    assert states(stopped) == {"lr0.01-seed1": "finished", "lr0.01-seed2": "interrupted"}
    assert stopped.choice is None
    first = tmp_path / "runs" / "toy" / "lr0.01-seed1" / ADAPTER
    written = first.stat().st_mtime_ns
    again = swept(*grid)
    assert again.interrupted_by is None
    assert first.stat().st_mtime_ns == written
    for slug, status in states(again).items():
        assert status == "finished"
        assert sha256(again.record.folder / slug / ADAPTER) == sha256(finished.record.folder / slug / ADAPTER)


def test_a_signal_in_the_last_step_of_a_run_keeps_the_next_from_beginning(
    swept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, run_number=1, step=STEPS - 1)
    stopped = swept("training.learning_rate=1e-2", SEEDS)
    assert states(stopped) == {"lr0.01-seed1": "finished", "lr0.01-seed2": "waiting"}
    assert stopped.interrupted_by == signal.SIGTERM


def test_a_signal_while_a_model_is_loaded_is_not_lost(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.prepare_data

    def prepare_and_signal(*args: Any, **how: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **how)

    monkeypatch.setattr(run, "prepare_data", prepare_and_signal)
    stopped = swept("training.learning_rate=1e-2", SEEDS)
    assert states(stopped) == {"lr0.01-seed1": "interrupted", "lr0.01-seed2": "waiting"}
    assert (stopped.interrupted_by, stopped.record.points[0].steps) == (signal.SIGINT, 1)


def test_with_a_stored_reference_no_run_computes_one(root: Path, swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[Any] = []
    original = lorafocal.reference.token_logps

    def counted(model: Any, pack: Any, *more: Any) -> Any:
        forwards.append(pack.pair_ids)
        return original(model, pack, *more)

    monkeypatch.setattr(lorafocal.reference, "token_logps", counted)
    stored = {"reference__kind": "cached", "reference__store": str(root / "references")}
    rates = "training.learning_rate=1e-3,1e-2"
    cached = swept(rates, file=write_config(root, "stored.yaml", **stored))
    assert list(states(cached).values()) == ["finished"] * 2
    assert forwards == []
    live = swept(rates, overrides=("name=live",))
    assert len(forwards) >= 2 * STEPS
    for one, other in zip(cached.record.points, live.record.points, strict=True):
        assert one.held_out[LOSS] == pytest.approx(other.held_out[LOSS], rel=1e-5)


def live_parameters() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Live parameters before each run of a sweep."""
    found: list[int] = []
    original = run.train

    def train(*args: Any, **options: Any) -> RunSummary:
        found.append(live_parameters())
        return original(*args, **options)

    monkeypatch.setattr(run, "train", train)
    return found


def test_models_do_not_pile_up(counts: list[int], swept: Any) -> None:
    """Also after a run that failed, whose traceback holds all of its frames."""
    report = swept("training.learning_rate=1e-60,1e-2", SEEDS)
    assert list(states(report).values()).count("failed") == 2
    assert counts == counts[:1] * 4
