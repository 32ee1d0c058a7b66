"""What a sweep writes down and asks for, with runs that train nothing; real ones are in `test_sweep_runs`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafocal import run
from lorafocal.caching import CacheReport
from lorafocal.config import Config, load_config, resolved_yaml
from lorafocal.errors import InputError
from lorafocal.evaluate import during
from lorafocal.report import sweep_page
from lorafocal.report.sweep_page import SweepReport
from lorafocal.report.sweep_results import ACCURACY, LOSS, Point
from lorafocal.run import RunSummary
from lorafocal.sweep import sweep
from tests.toy_run import run_config, write_inputs

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


class Recorder:
    """Stands in for `run.train`: leaves a run folder as training does, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.loss: Callable[[float], float] = lambda rate: rate
        self.refused: dict[str, Exception] = {}  # before anything is written
        self.failing: dict[str, Exception | type[BaseException]] = {}
        self.base: Any = {"sha256": "b"}
        self.trained: Callable[[str], int] = lambda name: 21

    def __call__(
        self, config: Any, *, resume: bool, quiet: bool, runs_dir: Path, inspect: Any, callbacks: Any
    ) -> RunSummary:
        assert callbacks is during.callbacks  # a section `evaluation` holds in every run
        self.asked.append((config.name, resume))
        data = {"eval": {"pairs": 5}, "train": {"pairs": self.trained(config.name)}}
        manifest = {"base": self.base, "data": data}
        inspect(manifest)
        folder = runs_dir / config.name
        if config.name in self.refused:
            raise self.refused[config.name]
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
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
    return sweeper(config, tmp_path)


def sweeper(config: Path, tmp_path: Path) -> Callable[..., SweepReport]:
    """Sweeps into a folder of one test's own."""

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


def test_a_run_on_other_inputs_is_refused_before_it_is_trained(recorder: Recorder, swept: Any, tmp_path: Path) -> None:
    swept("training.learning_rate=1e-3")
    recorder.base = {"sha256": "another"}
    report = swept(RATES)
    assert states(report) == {"lr0.001": "finished", "lr0.01": "refused"}
    assert "not those of the runs before it" in report.record.points[1].reason
    assert "\n  base.sha256: 'b' -> 'another'\n" in report.record.points[1].reason
    assert not (tmp_path / "runs" / "toy" / "lr0.01").exists()
    recorder.base = {"sha256": "b"}
    assert states(swept(RATES)) == {"lr0.001": "finished", "lr0.01": "finished"}


def test_digests_that_earlier_versions_did_not_keep_are_not_asked_for(recorder: Recorder, swept: Any) -> None:
    swept("training.learning_rate=1e-3")
    recorder.base = {"sha256": "b", "config_sha256": "c"}
    assert states(swept(RATES)) == {"lr0.001": "finished", "lr0.01": "finished"}


def test_as_long_as_nothing_was_trained_the_config_may_be_put_right(recorder: Recorder, swept: Any, root: Path) -> None:
    recorder.refused = dict.fromkeys(("lr0.001", "lr0.01"), InputError("adapter.targets: no such layer"))
    assert set(states(swept(RATES)).values()) == {"refused"}
    recorder.refused = {}
    report = swept(RATES, file=write_config(root, "right.yaml", adapter__r=8))
    assert set(states(report).values()) == {"finished"}


def test_a_number_is_one_setting_however_it_is_written(recorder: Recorder, swept: Any) -> None:
    swept("training.warmup_ratio=0.0", "training.seed=1,2")
    report = swept("training.warmup_ratio=0,0.5", "training.seed=1,2,3")
    assert [len(setting["runs"]) for setting in report.as_dict()["settings"]] == [3, 3]


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


@pytest.mark.parametrize("made_by", ["manifest.json", "stages.json"])
def test_a_run_and_a_sweep_do_not_share_a_folder(
    recorder: Recorder, config: Path, tmp_path: Path, made_by: str
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / made_by).touch()
    with pytest.raises(InputError, match="toy holds a run: give this sweep another `name`"):
        sweep(config, [RATES], runs_dir=tmp_path)
    (tmp_path / "toy" / made_by).rename(tmp_path / "toy" / "sweep.json")
    with pytest.raises(InputError, match="toy holds a sweep: give another `name`"):
        TRAIN(load_config(config), quiet=True, runs_dir=tmp_path)


def test_a_file_in_the_place_of_the_runs_is_refused(recorder: Recorder, config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="another --runs"):
        sweep(config, [RATES], runs_dir=tmp_path / "runs")
