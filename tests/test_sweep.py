"""`lorafocal sweep`: every point is an ordinary run, all is written down, and the same call goes on."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafocal.reference
from lorafocal import run
from lorafocal.caching import CacheReport
from lorafocal.config import Config, load_config, resolved_yaml
from lorafocal.errors import InputError
from lorafocal.evaluate import during
from lorafocal.publish import sha256
from lorafocal.report import sweep_page
from lorafocal.report.sweep_page import SweepReport
from lorafocal.report.sweep_results import ACCURACY, LOSS, Point
from lorafocal.report.write import write_report
from lorafocal.run import RunSummary
from lorafocal.sweep import sweep
from lorafocal.trainer import FocalPOTrainer
from tests.toy_run import metric_lines, run_config, write_inputs

RATES, SEEDS = "training.learning_rate=1e-3,1e-2", "training.seed=1,2"
STEPS = 3
TRAIN = run.train  # which `Recorder` stands in for


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    """Three steps a run, a checkpoint after each."""
    return write_config(root, "run.yaml")


def write_config(root: Path, name: str, **changes: Any) -> Path:
    steps = {"training__num_train_epochs": 1, "training__save_steps": 1}
    file = root / name
    file.write_text(resolved_yaml(run_config(root, **(steps | changes))))
    return file


# --- bookkeeping, with runs that train nothing ---------------------------------------------------------------


class Recorder:
    """Stands in for `run.train`: leaves a run folder as training does, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.loss: Callable[[float], float] = lambda rate: rate
        self.failing: dict[str, Exception | type[BaseException]] = {}
        self.base = "b"
        self.trained: Callable[[str], int] = lambda name: 21

    def __call__(self, config: Any, *, resume: bool, quiet: bool, runs_dir: Path, callbacks: Any) -> RunSummary:
        assert callbacks is during.callbacks  # a section `evaluation` holds in every run
        self.asked.append((config.name, resume))
        folder = runs_dir / config.name
        folder.mkdir(exist_ok=True)
        data = {"eval": {"pairs": 5}, "train": {"pairs": self.trained(config.name)}}
        (folder / "manifest.json").write_text(json.dumps({"base": self.base, "data": data}))
        if config.name in self.failing:
            raise self.failing[config.name]
        (folder / "adapter").mkdir(exist_ok=True)
        rate = config.training.fields["learning_rate"]
        return RunSummary(folder, STEPS, STEPS, {LOSS: self.loss(rate), ACCURACY: 0.5, "eval_runtime": 1.0})

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(run, "train", made)
    monkeypatch.setattr(sweep_page, "sweep_png", lambda *a: b"")  # drawn in tests/report
    return made


@pytest.fixture
def swept(config: Path, tmp_path: Path) -> Callable[..., SweepReport]:
    """A sweep into a folder of this test's own."""

    def again(*grid: str, overrides: tuple[str, ...] = (), file: Path = config, **options: Any) -> SweepReport:
        return sweep(file, grid, overrides, runs_dir=tmp_path / "runs", quiet=True, **options)

    return again


def saved(tmp_path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((tmp_path / "runs" / "toy" / "sweep.json").read_text())
    return record


def states(report: SweepReport) -> dict[str, str]:
    return {point.slug: point.status for point in report.record.points}


def test_nothing_runs_before_all_of_the_grid_is_checked(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was run"):
        swept("training.learning_rate=1e-3,fast")
    assert recorder.asked == []
    assert not (tmp_path / "runs").exists()


def test_the_record_has_every_value_metric_and_state(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    swept(RATES)
    record = saved(tmp_path)
    assert record["axes"] == {"training.learning_rate": [1e-3, 1e-2]}
    assert record["criterion"]["key"] == LOSS
    assert record["best"]["run"] == "lr0.001"
    point = Point(**record["points"][1])
    assert (point.slug, point.status, point.steps) == ("lr0.01", "finished", STEPS)
    assert point.held_out == {LOSS: 1e-2, ACCURACY: 0.5}


def test_the_same_call_trains_nothing_twice(recorder: Recorder, swept: Any) -> None:
    first = swept(RATES, SEEDS)
    again = swept(SEEDS, RATES)  # axes in another order give the same runs
    assert len(recorder.asked) == 4
    assert states(again) == states(first) == dict.fromkeys(recorder.names, "finished")


def test_more_values_extend_a_sweep(recorder: Recorder, swept: Any) -> None:
    swept(RATES)
    report = swept("training.learning_rate=1e-4,1e-3")
    assert recorder.names == ["lr0.001", "lr0.01", "lr1e-4"]
    assert len(report.record.points) == 3
    assert report.choice is not None
    assert report.choice.point.slug == "lr1e-4"


def test_an_axis_more_takes_up_the_runs_there_are(recorder: Recorder, swept: Any) -> None:
    swept(RATES)
    report = swept(RATES, "training.seed=42,1")  # 42 is what the config says
    assert recorder.names == ["lr0.001", "lr0.01", "lr0.001-seed1", "lr0.01-seed1"]
    assert [len(setting["runs"]) for setting in report.as_dict()["settings"]] == [2, 2]


def test_an_axis_of_one_value_is_no_reason_to_leave_the_loss(recorder: Recorder, swept: Any) -> None:
    assert swept(RATES, "objective.gamma=0.1").record.criterion.key == LOSS
    assert swept(RATES, "objective.gamma=0").record.criterion.key == ACCURACY  # those at 0.1 are still there


def test_another_config_is_refused_by_name(recorder: Recorder, swept: Any, root: Path) -> None:
    swept(RATES)
    other = write_config(root, "other.yaml", adapter__r=8)
    with pytest.raises(InputError, match=r"is a sweep of another config.*\n  adapter\.r: 4 -> 8\n.*another `name`"):
        swept("training.learning_rate=1e-4", file=other)
    with pytest.raises(InputError, match=r"objective\.beta: 0\.1 -> 0\.2"):
        swept(RATES, overrides=("objective.beta=0.2",))
    assert len(recorder.asked) == 2


def test_what_cannot_reach_the_weights_may_change(recorder: Recorder, swept: Any) -> None:
    swept(RATES)
    swept(RATES, overrides=("training.logging_steps=1", "training.save_total_limit=1"))
    assert len(recorder.asked) == 2


def test_a_refused_run_is_recorded_and_tried_again(recorder: Recorder, swept: Any) -> None:
    recorder.failing["lr0.001"] = InputError("no such layer")
    report = swept(RATES)
    assert states(report) == {"lr0.001": "refused", "lr0.01": "finished"}
    assert "refused  lr0.001: no such layer" in report.table()
    recorder.failing.clear()
    assert states(swept(RATES)) == {"lr0.001": "finished", "lr0.01": "finished"}
    assert recorder.asked[-1] == ("lr0.001", True)


def test_a_process_that_dies_loses_nothing_that_was_finished(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    recorder.failing["lr0.01"] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        swept(RATES)
    assert [point["status"] for point in saved(tmp_path)["points"]] == ["finished", "running"]
    recorder.failing.clear()
    swept(RATES)
    assert recorder.asked[2:] == [("lr0.01", True)]


def test_a_run_whose_folder_is_gone_is_trained_again(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    swept(RATES)
    shutil.rmtree(tmp_path / "runs" / "toy" / "lr0.01")
    swept(RATES)
    assert recorder.asked[2:] == [("lr0.01", False)]


def test_runs_on_other_inputs_are_never_compared(recorder: Recorder, swept: Any) -> None:
    swept("training.learning_rate=1e-3")
    recorder.base = "another"
    with pytest.raises(InputError, match=r"on other inputs than the runs before it.*\n  base: 'b' -> 'another'"):
        swept(RATES)
    recorder.base = "b"
    assert states(swept("training.learning_rate=1e-3")) == {"lr0.001": "finished", "lr0.01": "refused"}


@pytest.mark.parametrize("axis", ["data.steps.0.select.keep=0.5,0.8", "data.train={0}/train.jsonl,{0}/eval.jsonl"])
def test_training_pairs_may_be_the_axis(recorder: Recorder, swept: Any, root: Path, axis: str) -> None:
    recorder.trained = len
    file = write_config(root, "steps.yaml", data__steps=[{"select": {"by": "length_gap", "keep": 0.5}}])
    swept("training.learning_rate=1e-3", file=file)
    report = swept("training.learning_rate=1e-3", axis.format(root), file=file)
    assert list(states(report).values()) == ["finished"] * 2


def test_two_sweeps_of_one_folder_do_not_run_at_once(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    def meet(rate: float) -> float:
        with pytest.raises(InputError, match="is being swept by another process"):
            swept(RATES)
        return rate

    recorder.loss = meet
    swept("training.learning_rate=1e-3")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, swept: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a sweep runs in one process"):
        swept(RATES)


def test_a_damaged_record_is_told(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    swept(RATES)
    (tmp_path / "runs" / "toy" / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match=r"sweep\.json cannot be read as a sweep"):
        swept(RATES)


@pytest.mark.parametrize(("kind", "said"), [("disabled_adapter", True), ("cached", False)])
def test_what_is_computed_again_for_every_run_is_told(
    recorder: Recorder, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str, said: bool
) -> None:
    computed = []

    def compute(config: Config, quiet: bool) -> CacheReport:
        computed.append(config.name)
        return CacheReport(8, 0, 1.0)

    monkeypatch.setattr(run, "cache_reference", compute)
    sweep(write_config(root, f"{kind}.yaml", reference__kind=kind), [RATES, SEEDS], runs_dir=tmp_path)
    heard = capsys.readouterr().err
    assert "sweep toy: 4 runs, 4 to train, best by eval_loss" in heard
    assert ("reference.kind=cached would compute it once" in heard) is said
    assert len(computed) == (0 if said else 1)
    assert ("reference store: 8 answers computed in 1.0 s" in heard) is not said


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({}, {"best": "accuracy"}, "--best is 'accuracy'"),
        ({"data__train": "nowhere.jsonl"}, {}, "nowhere.jsonl does not exist"),
    ],
)
def test_what_no_run_could_do_is_refused_at_once_and_leaves_no_folder(
    recorder: Recorder, root: Path, tmp_path: Path, changes: Any, options: Any, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        sweep(write_config(root, "wrong.yaml", **changes), [RATES], runs_dir=tmp_path / "runs", **options)
    assert not list(tmp_path.iterdir())


def test_a_run_and_a_sweep_do_not_share_a_folder(recorder: Recorder, config: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "manifest.json").touch()
    with pytest.raises(InputError, match="toy holds a run: give this sweep another `name`"):
        sweep(config, [RATES], runs_dir=tmp_path)
    (tmp_path / "toy" / "manifest.json").rename(tmp_path / "toy" / "sweep.json")
    with pytest.raises(InputError, match="toy holds a sweep: give another `name`"):
        TRAIN(load_config(config), quiet=True, runs_dir=tmp_path)


def test_a_file_in_the_place_of_the_runs_is_refused(recorder: Recorder, config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="another --runs"):
        sweep(config, [RATES], runs_dir=tmp_path / "runs")


# --- real runs ----------------------------------------------------------------------------------------------

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(config: Path, root: Path) -> SweepReport:
    """Two rates, of which one moves nothing, with two seeds each."""
    grid = ["training.learning_rate=1e-2,1e-60", SEEDS]
    return sweep(config, grid, runs_dir=root / "runs", quiet=True)


@pytest.mark.engine
@pytest.mark.row("57")
def test_a_point_is_the_run_that_train_gives(finished: SweepReport, config: Path, tmp_path: Path) -> None:
    alone = run.train(load_config(config, ["training.learning_rate=1e-2", "training.seed=2"]), runs_dir=tmp_path)
    folder = finished.record.folder / "lr0.01-seed2"
    assert sha256(alone.folder / ADAPTER) == sha256(folder / ADAPTER)
    assert metric_lines(folder, key="eval_loss")[-1][LOSS] == finished.record.points[1].held_out[LOSS]
    resolved = load_config(folder / "config.yaml")
    assert run.train(resolved, resume=True, quiet=True, runs_dir=folder.parent).steps == STEPS
    assert write_report([folder], tmp_path / "report").page.exists()


@pytest.mark.engine
def test_a_run_that_fails_is_recorded_with_its_reason_and_the_others_go_on(finished: SweepReport) -> None:
    assert list(states(finished).values()) == ["finished", "finished", "failed", "failed"]
    assert "no trained weight moved at step 1" in finished.record.points[2].reason
    assert finished.choice is not None
    assert finished.choice.setting.values == {"training.learning_rate": 1e-2}


@pytest.mark.engine
def test_what_failed_is_not_tried_again_until_its_folder_is_gone(
    finished: SweepReport, config: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(run, "train", lambda config, **options: asked.append(config.name))
    grid = ["training.learning_rate=1e-2,1e-60", SEEDS]
    again = sweep(config, grid, runs_dir=root / "runs", quiet=True)
    assert asked == []
    assert again.as_dict() == finished.as_dict()


@pytest.mark.engine
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


@pytest.mark.engine
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


@pytest.mark.engine
def test_a_signal_in_the_last_step_of_a_run_keeps_the_next_from_beginning(
    swept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, run_number=1, step=STEPS - 1)
    stopped = swept("training.learning_rate=1e-2", SEEDS)
    assert states(stopped) == {"lr0.01-seed1": "finished", "lr0.01-seed2": "waiting"}
    assert stopped.interrupted_by == signal.SIGTERM


@pytest.mark.engine
def test_a_signal_while_a_model_is_loaded_is_not_lost(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.prepare_data

    def prepare_and_signal(*args: Any, **how: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **how)

    monkeypatch.setattr(run, "prepare_data", prepare_and_signal)
    stopped = swept("training.learning_rate=1e-2", SEEDS)
    assert states(stopped) == {"lr0.01-seed1": "interrupted", "lr0.01-seed2": "waiting"}
    assert (stopped.interrupted_by, stopped.record.points[0].steps) == (signal.SIGINT, 1)


@pytest.mark.engine
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


@pytest.mark.engine
def test_models_do_not_pile_up(counts: list[int], swept: Any) -> None:
    """Also after a run that failed, whose traceback holds all of its frames."""
    report = swept("training.learning_rate=1e-60,1e-2", SEEDS)
    assert list(states(report).values()).count("failed") == 2
    assert counts == counts[:1] * 4
