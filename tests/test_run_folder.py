"""A run folder is one run's at a time, and what is in it outlives a disk that fills up."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

import lorafocal.shard_files
import lorafocal.together
from lorafocal import run
from lorafocal.config import Config, check_config, resolved_yaml
from lorafocal.errors import FullDisk, InputError
from lorafocal.publish import alone_in, sha256
from lorafocal.rehearsal import rehearse
from lorafocal.stages import train_stages
from lorafocal.sweep import sweep
from lorafocal.trainer import FocalPOTrainer
from tests.toy_run import metric_lines, run_config, write_inputs

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"  # as safetensors says it
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def unbroken(root: Path) -> run.RunSummary:
    return run.train(run_config(root), quiet=True, runs_dir=root / "runs")


# --- one run at a time --------------------------------------------------------------------------------------


def in_another_process(act: Callable[[], object]) -> str:
    """What refuses `act` there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
        except InputError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    said = os.read(reading, 10_000).decode()
    os.close(reading)
    return said


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[str]:
    """What refuses `act`, done once by another process in the first step of a training."""
    original, refused = FocalPOTrainer.training_step, list[str]()

    def step(self: FocalPOTrainer, *args: Any, **kwargs: Any) -> Any:
        if not refused:
            refused.append("not done yet")  # the other process would begin anew here
            refused[0] = in_another_process(act)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FocalPOTrainer, "training_step", step)
    return refused


@pytest.mark.slow
def test_a_run_that_is_being_trained_is_not_resumed_beside(
    root: Path, unbroken: run.RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(root)
    refused = meanwhile(monkeypatch, lambda: run.train(config, resume=True, quiet=True, runs_dir=tmp_path))
    done = run.train(config, quiet=True, runs_dir=tmp_path)
    assert refused == [f"{tmp_path / 'toy'} is being trained in by another process: wait for it, or stop it first"]
    assert metric_lines(done.folder) == metric_lines(unbroken.folder)
    assert sha256(done.folder / ADAPTER) == sha256(unbroken.folder / ADAPTER)
    assert not list(done.folder.glob(".*"))
    assert run.train(config, resume=True, quiet=True, runs_dir=tmp_path).steps == done.steps  # it is free again


@pytest.mark.slow
def test_neither_are_stages(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = run_config(root, training__num_train_epochs=1).model_dump(mode="json")
    config = check_config(values | {"stages": 2, "name": "staged"})
    refused = meanwhile(monkeypatch, lambda: train_stages(config, resume=True, quiet=True, runs_dir=tmp_path))
    train_stages(config, quiet=True, runs_dir=tmp_path)
    assert refused[0].startswith(f"{tmp_path / 'staged'} is being trained in by another process")


def test_a_new_run_does_not_begin_where_another_just_has(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the folder and its claim another one has been there, and has ended."""
    original = run._arguments

    def slow(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "toy").mkdir()
        (tmp_path / "toy" / "manifest.json").write_text("{}")
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "_arguments", slow)
    with pytest.raises(InputError, match="already holds a run"):
        run.train(run_config(root), quiet=True, runs_dir=tmp_path)
    assert (tmp_path / "toy" / "manifest.json").read_text() == "{}"


def test_what_the_finished_adapter_would_replace_is_found_before_it_is_trained(root: Path, tmp_path: Path) -> None:
    config = run_config(root)
    notes = tmp_path / config.name / "adapter" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(InputError, match=r"adapter holds 'notes\.txt'.*; choose another `name`, or move that away"):
        run.train(config, quiet=True, runs_dir=tmp_path)
    assert [*notes.parent.parent.rglob("*")] == [notes.parent, notes]


def test_a_folder_that_another_process_is_about_to_fill_is_left_to_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    with alone_in(tmp_path / "toy", "trained in"), pytest.raises(InputError, match="is being trained in by another"):
        run.train(run_config(root), quiet=True, runs_dir=tmp_path)
    assert [*tmp_path.rglob("*")] == [tmp_path / "toy"]


def test_the_other_ranks_learn_of_a_refusal_and_claim_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for refused in (True, False):
        monkeypatch.setattr(lorafocal.together, "of_all_ranks", lambda mine, refused=refused: [int(refused), mine])
        told = pytest.raises(InputError, match="rank 0 could not do its part") if refused else nullcontext()
        with alone_in(tmp_path, "trained in"), told, run.claimed(tmp_path, lambda: None):
            assert not refused


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_a_run_that_ends_before_it_begins_leaves_no_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def ended(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "_tokenized", ended)
    with pytest.raises(error):
        run.train(run_config(root), quiet=True, runs_dir=tmp_path / "runs")
    assert not list(tmp_path.iterdir())


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "told"),
    [
        (2, "checkpoint-2 is untouched: make room, then go on by --resume"),  # of two files each
        (0, "there is no checkpoint yet: make room, then begin anew by --resume"),
    ],
)
def test_a_disk_that_fills_up_is_told_with_what_is_kept(
    root: Path, unbroken: run.RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, told: str
) -> None:
    written: list[Path] = []

    def save(tensors: Any, file: Path) -> None:
        if len(written) == files:
            raise SafetensorError(FULL)
        save_file(tensors, file)
        written.append(file)

    with monkeypatch.context() as patched:
        patched.setattr(lorafocal.shard_files, "save_file", save)
        with pytest.raises(InputError) as error:
            run.train(run_config(root), quiet=True, runs_dir=tmp_path)
    assert str(error.value) == f"{tmp_path / 'toy'}: No space left on device; {told}"
    done = run.train(run_config(root), resume=True, quiet=True, runs_dir=tmp_path)
    assert sha256(done.folder / ADAPTER) == sha256(unbroken.folder / ADAPTER)
    assert metric_lines(done.folder) == metric_lines(unbroken.folder)


def test_only_a_full_disk_is_told_so_and_one_elsewhere_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), run.full_disk_told(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "x")
    with pytest.raises(InputError, match=r"^/cache/x: Disk quota exceeded; there is no"), run.full_disk_told(tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/x")
    with (
        pytest.raises(InputError, match=r"too large \(for ulimit -f, or .*no checkpoint"),
        run.full_disk_told(tmp_path),
    ):
        raise OSError(errno.EFBIG, "File too large")


def test_a_sweep_ends_with_the_room_and_goes_on_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / "run.yaml", list[str]()
    file.write_text(resolved_yaml(run_config(root)))

    def train(config: Config, **_: Any) -> None:
        asked.append(config.name)
        raise FullDisk(f"{config.name}: No space left on device", "go on by --resume")

    monkeypatch.setattr(run, "train", train)
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"^lr0\.01: No space left on device; the sweep has ended: make room, then"
        ):
            sweep(file, ["training.learning_rate=1e-2,1e-3"], quiet=True, runs_dir=tmp_path)
    assert asked == ["lr0.01"] * 2


def test_of_a_rehearsal_nothing_is_kept_to_go_on_from(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FullDisk("there: No space left on device", "go on by --resume")

    monkeypatch.setattr(run, "train", full)
    with pytest.raises(InputError, match=r"^there: No space left on device; make room there, or name .* TMPDIR$"):
        rehearse(run_config(root), quiet=True)


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made anew"])
def test_nobody_is_alone_in_a_folder_that_lost_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """A start that failed removes the empty folder that it made, between another's opening and locking it."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = fcntl.flock

    def late(handle: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            folder.rmdir()
            if again:
                folder.mkdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="was replaced by another process just now"), alone_in(folder, "trained in"):
        pass
    assert folder.exists() is again
