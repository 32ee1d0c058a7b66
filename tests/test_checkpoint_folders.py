"""Of many checkpoint folders the newest whole one is found, whatever was torn, planted or killed."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafocal.checkpoint import OPTIMIZER_FILE, PARAMETERS_FILE, STATE_FILE, latest_complete, rotate
from lorafocal.errors import InputError
from lorafocal.publish import recover, why_incomplete
from tests.killing import moments
from tests.small_run import Run, checkpoint


def step_of(run_dir: Path) -> int:
    path = latest_complete(run_dir).path
    assert path is not None
    assert why_incomplete(path) is None
    return Run().load(path)["global_step"]


@pytest.mark.slow
@pytest.mark.row("55", "F9")
def test_killed_anywhere_in_a_save_the_newest_whole_checkpoint_loads(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 1)
    checkpoint(run, tmp_path, 1)
    run.train(1, 2)

    def save_and_rotate() -> None:
        checkpoint(run, tmp_path, 2, replace=True)
        rotate(tmp_path, keep=1)

    steps = []
    for was_killed in moments(save_and_rotate, tmp_path):
        recover(tmp_path)
        steps.append(step_of(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        if was_killed and not (tmp_path / "checkpoint-1").exists():
            run_at_1 = Run()
            run_at_1.train(0, 1)
            checkpoint(run_at_1, tmp_path, 1)
    assert set(steps) == {1, 2}
    assert steps[-1] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.row("F9")
@pytest.mark.parametrize("file", [PARAMETERS_FILE, OPTIMIZER_FILE, STATE_FILE, "complete.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, file: str, damage: str) -> None:
    run = Run()
    run.train(0, 2)
    for step in (9, 10):
        checkpoint(run, tmp_path, step)
    victim = tmp_path / "checkpoint-10" / file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0x20
    match damage:
        case "flipped":
            victim.write_bytes(data)
        case "truncated":
            victim.write_bytes(data[:-1] if file != "complete.json" else data[:-9])
        case "removed":
            victim.unlink()
    path, skipped = latest_complete(tmp_path)
    assert path == tmp_path / "checkpoint-9"
    assert len(skipped) == 1
    assert skipped[0].startswith("checkpoint-10 is passed over: ")


def test_names_that_are_no_checkpoints_are_ignored(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 2)
    checkpoint(run, tmp_path, 2)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-3.bak", ".checkpoint-9.partial-1", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "checkpoint-2")
    path, skipped = latest_complete(tmp_path)
    assert path == tmp_path / "checkpoint-2"
    assert skipped == ["checkpoint-7 is passed over: not a folder"]
    assert latest_complete(tmp_path / "nowhere") == (None, [])


def test_rotation_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 2)
    for step in (2, 4, 10, 12):
        checkpoint(run, tmp_path, step)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    assert rotate(tmp_path, keep=2) == ["checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-4",
    ]
    (tmp_path / "checkpoint-12" / STATE_FILE).write_bytes(
        b"\0" * (tmp_path / "checkpoint-12" / STATE_FILE).stat().st_size
    )
    assert rotate(tmp_path, keep=1) == []  # the only one that verifies is the older
    assert step_of(tmp_path) == 10
    with pytest.raises(InputError, match="at least one"):
        rotate(tmp_path, keep=0)


# --- planted files ------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (13,)


PLANTED = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
)


@pytest.mark.row("S1")
@pytest.mark.parametrize("kind", ["pickle", "pipe"])
def test_planted_files_are_never_opened(tmp_path: Path, kind: str) -> None:
    """A pipe blocks whoever opens it, native code included; the audit hook sees every opening by Python."""
    run = Run()
    run.train(0, 2)
    for step in (1, 2):
        checkpoint(run, tmp_path, step)
    for folder, name in itertools.product(tmp_path.iterdir(), PLANTED):
        if kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Bomb()))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            sys.addaudithook(_die_on_opening_planted)
            assert step_of(tmp_path) == 2
            assert rotate(tmp_path, keep=1) == ["checkpoint-1"]
            status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(result) == 0


def _die_on_opening_planted(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith((".pt", ".pth", ".bin", ".pkl")):
        os._exit(14)
