"""Two ranks fill one folder: it is published whole or not at all, whichever of them dies or fails, and when."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

import lorafocal.publish
import lorafocal.shard_files
import lorafocal.together
from lorafocal import launch
from lorafocal.checkpoint import latest_complete, rotate, save_state
from lorafocal.errors import InputError
from lorafocal.publish import recover, why_incomplete
from lorafocal.saving import write_checkpoint
from lorafocal.together import all_or_none, check_same, of_all_ranks, published_by_all
from tests.engine.forked import forked_ranks
from tests.small_run import Run
from tests.test_killed_runs import at, kill_self

pytestmark = pytest.mark.engine

MOST = 130  # bytes of tensors in a file: the run's tensors have 128, and step counts 4
STEP_2 = "checkpoint-2"


def save(run_dir: Path, run: Run, step: int) -> None:
    with published_by_all(run_dir / f"checkpoint-{step}") as folder:
        run.save(folder, {"global_step": step}, most=MOST)
    if launch.is_main():
        rotate(run_dir, 1)


def trained(steps: int) -> Run:
    run = Run()
    run.train(0, steps)
    return run


def save_both(run_dir: Path) -> list[int]:
    return forked_ranks(lambda _: save(run_dir, trained(2), 2), run_dir.parent)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With a checkpoint after step 1."""
    run_dir = tmp_path / "run"
    assert forked_ranks(lambda _: save(run_dir, trained(1), 1), tmp_path) == [0, 0]
    return run_dir


def goes_on(run_dir: Path) -> None:
    """What is left can be gone on from, in one process, and nothing torn lies beside it."""
    recover(run_dir)
    found = latest_complete(run_dir)
    assert found.skipped == []
    assert found.path is not None
    run = Run(seed=1)
    run.base = Run().base
    step = run.load(found.path)["global_step"]
    assert run.everything() == trained(step).everything()
    run.train(step, 4)
    assert run.everything() == trained(4).everything()


def test_both_write_and_what_they_wrote_is_what_one_writes(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoint-1"
    assert why_incomplete(checkpoint) is None
    assert json.loads((checkpoint / "state.json").read_text())["files"] == {"parameters": 2, "optimizer": 6}
    trained(1).save(tmp_path / "alone", {"global_step": 1}, most=MOST)
    for file in (tmp_path / "alone").iterdir():
        assert (checkpoint / file.name).read_bytes() == file.read_bytes(), file.name
    goes_on(run_dir)


def named(name: str) -> Callable[..., bool]:
    return lambda _, path: Path(path).name == name


DEATHS: dict[str, tuple[int, Callable[[], None]]] = {
    "the other rank, before its file": (
        1, at(lorafocal.shard_files, "save_file", named("parameters-00002.safetensors")),
    ),
    "the other rank, after its last file": (
        1, at(lorafocal.shard_files, "save_file", named("optimizer-00006.safetensors"), after=True),
    ),
    "rank 0, before the optimiser": (0, at(lorafocal.shard_files, "save_file", named("optimizer.safetensors"))),
    "rank 0, before the record": (0, at(lorafocal.publish, "write_record")),
    "rank 0, before the renaming": (0, at(Path, "replace", named(STEP_2))),
    "the other rank, while rank 0 publishes": (1, at(lorafocal.together.ExitStack, "close")),
    "rank 0, renamed": (0, at(Path, "replace", named(STEP_2), after=True)),
    "rank 0, within the rotation": (0, at(Path, "replace", lambda _, to: ".checkpoint-1." in str(to), after=True)),
}  # fmt: skip


@pytest.mark.row("55", "F9")
@pytest.mark.parametrize("point", DEATHS)
def test_a_rank_killed_within_the_save_leaves_a_whole_checkpoint(point: str, run_dir: Path, tmp_path: Path) -> None:
    dies, install = DEATHS[point]

    def work(rank: int) -> None:
        if rank == dies:
            install()
        save(run_dir, trained(2), 2)

    codes = forked_ranks(work, tmp_path)
    assert codes[dies] == -signal.SIGKILL
    goes_on(run_dir)
    assert save_both(run_dir) == [0, 0]  # the next save takes away what the dead one left
    assert sorted(path.name for path in run_dir.iterdir()) == [STEP_2]
    goes_on(run_dir)


@pytest.mark.row("47")
@pytest.mark.parametrize("loss", ["an empty gather", "NaN on the rank that writes it", "a full disk on one rank"])
def test_a_save_that_fails_on_one_rank_fails_on_both_and_keeps_the_checkpoint_before(
    loss: str, run_dir: Path, tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        run = trained(2)
        whole: Any = run.engine.full
        if loss == "an empty gather":  # what ZeRO-3 gives where nothing was gathered
            run.engine.full = lambda parameter: torch.empty(0)  # type: ignore[method-assign]
        elif loss == "a full disk on one rank":
            if rank == 1:
                at(lorafocal.shard_files, "save_file", do=_no_space)()
        else:  # lora_B is the second tensor, and rank 1's
            run.engine.full = lambda p: whole(p) * (float("nan") if rank == 1 else 1)  # type: ignore[method-assign]
        with pytest.raises((InputError, OSError)) as caught:
            save(run_dir, run, 2)
        (tmp_path / f"said-{rank}").write_text(str(caught.value))

    assert forked_ranks(work, tmp_path) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    why = {"an empty gather": "is empty: gather", "a full disk on one rank": "No space"}.get(loss, "NaN")
    assert all(why in line for line in said)
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-1"]
    goes_on(run_dir)


def _no_space() -> None:
    raise OSError(28, "No space left on device")


def wrong_on(wrong: int, rank: int) -> None:
    with all_or_none():
        if rank == wrong:
            raise InputError("wrong here")


def test_ranks_tell_each_other_numbers_and_an_error_is_everybodys(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        assert of_all_ranks(10 + rank) == [10, 11, 12]
        with pytest.raises(
            InputError, match="^wrong here" if rank == 1 else "rank 1 could not do its part: wrong here"
        ):
            wrong_on(1, rank)
        wrong_on(5, rank)

    assert forked_ranks(work, tmp_path, world=3) == [0, 0, 0]


def test_ranks_that_were_given_different_things_are_refused_on_all_of_them(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        check_same({"config": "ab", "set of pairs": {"train": [1, 2]}})
        with pytest.raises(InputError, match="rank 2 has another set of pairs than rank 0"):
            check_same({"config": "ab", "set of pairs": {"train": [1, 2 + rank // 2]}})

    assert forked_ranks(work, tmp_path, world=3) == [0, 0, 0]


def test_a_rank_that_does_not_share_the_folder_leaves_the_writing_to_the_others(tmp_path: Path) -> None:
    """On another machine without a common disk the folder is not there."""

    def work(rank: int) -> None:
        with published_by_all(tmp_path / "run" / "checkpoint-1") as folder:
            seen = folder if rank == 0 else folder / "elsewhere"
            save_state(seen, **trained(1).parts, extra={"global_step": 1}, most=MOST)

    assert forked_ranks(work, tmp_path) == [0, 0]
    goes_on(tmp_path / "run")


def test_a_file_in_the_way_is_told_of_on_every_rank(tmp_path: Path) -> None:
    taken = tmp_path / "checkpoint-1"
    taken.write_text("mine")

    def work(rank: int) -> None:
        with (
            pytest.raises(InputError, match="is a file" if rank == 0 else "rank 0 could not"),
            published_by_all(taken),
        ):
            kill_self()

    assert forked_ranks(work, tmp_path) == [0, 0]
    assert taken.read_text() == "mine"


def test_what_is_made_fails_on_both_where_the_rank_that_writes_it_fails(run_dir: Path, tmp_path: Path) -> None:
    """The others would wait for it in the save's next exchange."""

    def full_disk(*_: Any, **__: Any) -> None:
        if launch.is_main():
            raise OSError(28, "No space left on device")

    def work(rank: int) -> None:
        made: Any = SimpleNamespace(mark=full_disk)
        run = trained(2)
        with pytest.raises(OSError if rank == 0 else InputError, match="No space" if rank == 0 else "rank 0 could not"):
            write_checkpoint(
                run_dir, TrainerState(global_step=2), made=made, keep=None, engine=run.engine, extra={"pairs_seen": 0}
            )

    assert forked_ranks(work, tmp_path) == [0, 0]
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-1"]
