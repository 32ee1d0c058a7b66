"""A run that is killed anywhere and resumed ends with the very bits of one that was left alone.

Most runs here are `lorafocal train` in a fork of this process, which saves the seconds an import takes; one is a real
process killed from outside. In the forks everything that pickles is made to raise.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafocal.saving
import lorafocal.shard_files
from lorafocal import cli, run
from lorafocal.config import resolved_yaml
from lorafocal.errors import InputError
from lorafocal.publish import sha256
from lorafocal.trainer import FocalPOTrainer
from tests.toy_run import EPOCHS, PAIRS, STEPS, metric_lines, run_config, write_inputs

Prepare = Callable[[], None]
SEEN = "seen.jsonl"  # beside the run folder: which pairs each process trained on at which step
REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.engine  # processes that are killed, one after the other


# --- running and killing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a `lorafocal` command ended: its exit code (negative: the signal that killed it) and all it printed."""

    code: int
    output: str


def lorafocal_command(*words: str | Path, prepare: Prepare = lambda: None) -> Ended:
    """Runs the command in a fork without pickle, after `prepare`, recording the pairs of every step."""
    runs = Path(words[words.index("--runs") + 1])
    runs.mkdir(exist_ok=True)
    log = runs / "output.txt"
    child = os.fork()
    if child == 0:
        code: Any = 99
        with log.open("w") as output:
            sys.stdout = sys.stderr = output
            try:
                _forbid_pickle()
                _record_pairs(runs / SEEN)
                prepare()
                sys.argv = ["lorafocal", *map(str, words)]
                cli.main()
            except SystemExit as end:
                code = end.code
            except BaseException:  # noqa: BLE001 - a fork must not return into pytest
                traceback.print_exc()
            output.flush()
            os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text())


def _forbid_pickle() -> None:
    class Forbidden:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("something was pickled or unpickled")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        setattr(pickle, name, Forbidden)
    torch.load = torch.save = Forbidden


def _record_pairs(file: Path) -> None:
    original, process = FocalPOTrainer._part_loss, os.getpid()

    def recorded(self: FocalPOTrainer, model: Any, part: Any, step_pairs: int) -> Any:
        with file.open("a") as lines:
            lines.write(json.dumps([process, self.state.global_step + 1, list(part.pack.pair_ids)]) + "\n")
        return original(self, model, part, step_pairs)

    FocalPOTrainer._part_loss = recorded  # type: ignore[method-assign]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(
    owner: Any, name: str, when: Callable[..., bool] = lambda *_: True, *, call: int = 1, after: bool = False,
    do: Callable[[], None] = kill_self,
) -> Prepare:  # fmt: skip
    """Kills the process before (or after) the n-th call of `owner.name` whose arguments fit `when`."""

    def install() -> None:
        original, left = getattr(owner, name), call

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= bool(when(*args))
            hit = left == 0 and when(*args)
            if hit and not after:
                do()
            result = original(*args, **kwargs)
            if hit and after:
                do()
            return result

        setattr(owner, name, deadly)

    return install


def in_step(number: int) -> Callable[..., bool]:
    return lambda trainer, *_: trainer.state.global_step == number - 1


def after_step(number: int) -> Callable[..., bool]:
    return lambda trainer, *_: trainer.state.global_step == number


def onto(name: str) -> Callable[..., bool]:
    return lambda _, target: Path(target).name.startswith(name)


def writing(name: str) -> Callable[..., bool]:
    return lambda _, path: path.name == name


# Two runs, and where one process after the other dies in them; each counts calls of its own.
DEATHS: dict[str, dict[str, Prepare]] = {
    "early": {
        "before the first step": at(FocalPOTrainer, "training_step"),
        "in the second save, before the optimiser": at(
            lorafocal.shard_files, "save_file", writing("optimizer.safetensors"), call=2
        ),
        "in the second save, before it is renamed": at(Path, "replace", onto("checkpoint-4")),
        "in the second save, renamed but not synced": at(Path, "replace", onto("checkpoint-4"), after=True),
        "in step 5, before the third pack": at(FocalPOTrainer, "_part_loss", in_step(5), call=3),
    },
    "late": {
        "after the optimiser's sixth step, before the save": at(FocalPOTrainer, "_save_checkpoint", after_step(6)),
        "after the third save, before the rotation": at(lorafocal.saving, "rotate"),
        "in the rotation, with the oldest half removed": at(Path, "replace", onto(".checkpoint-2."), after=True),
        "between the last step and the last evaluation": at(FocalPOTrainer, "evaluation_loop", after_step(STEPS)),
        "before the finished adapter is renamed": at(
            Path, "replace", lambda _, to: Path(to).name == "adapter" and Path(to).parent.name == "toy"
        ),
    },
}


# --- what is compared ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All of a finished run that must not depend on how often it was killed."""

    adapter: str
    state: dict[str, str]
    pairs: dict[int, list[str]]
    training: list[dict[str, float]]
    held_out: float
    names: set[str]


def outcome(runs: Path) -> Outcome:
    folder = runs / "toy"
    last = folder / f"checkpoint-{STEPS}"
    return Outcome(
        adapter=sha256(folder / "adapter" / "adapter_model.safetensors"),
        state={file.name: sha256(file) for file in last.glob("*.safetensors")},
        pairs=lineage(runs / SEEN),
        training=metric_lines(folder),
        held_out=metric_lines(folder, key="eval_loss")[-1]["eval_loss"],
        names={path.name for path in folder.iterdir()},
    )


def lineage(seen: Path) -> dict[int, list[str]]:
    """The pairs behind each step of the final weights, in order: a step's last process is the one that counts."""
    steps: dict[int, dict[int, list[str]]] = {}
    for process, step, ids in map(json.loads, seen.read_text().splitlines()):
        steps.setdefault(step, {}).setdefault(process, []).extend(ids)
    return {step: list(processes.values())[-1] for step, processes in steps.items()}


# --- runs that others are compared with ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_inputs(tmp_path_factory.mktemp("inputs"))
    (root / "toy.yaml").write_text(resolved_yaml(run_config(root, training__save_total_limit=2)))
    return root


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Outcome:
    ended = lorafocal_command("train", root / "toy.yaml", "--runs", root / "unbroken")
    assert ended.code == 0, ended.output
    return outcome(root / "unbroken")


@pytest.fixture(scope="module")
def stopped(root: Path) -> Path:
    """Runs folder of a run that was killed in step 8; its checkpoints are 4 and 6."""
    ended = lorafocal_command(
        "train", root / "toy.yaml", "--runs", root / "stopped", prepare=at(FocalPOTrainer, "training_step", in_step(8))
    )
    assert ended.code == -signal.SIGKILL, ended.output
    return root / "stopped"


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "runs"))


# --- killed -------------------------------------------------------------------------------------------------


@pytest.mark.row("55", "56", "F2")
def test_left_alone_it_sees_every_pair_once_an_epoch_in_another_order(unbroken: Outcome) -> None:
    assert [len(unbroken.pairs[step]) for step in range(1, STEPS + 1)] == [8, 8, 5] * EPOCHS
    epochs = [[i for step in (1, 2, 3) for i in unbroken.pairs[3 * epoch + step]] for epoch in range(EPOCHS)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"toy-{n}" for n in range(PAIRS))
    assert len({frozenset(epoch[:8]) for epoch in epochs}) == EPOCHS


@pytest.mark.row("55", "56", "F9")
@pytest.mark.parametrize("deaths", DEATHS)
def test_killed_at_every_point_and_resumed_it_ends_with_the_same_bits(
    deaths: str, root: Path, unbroken: Outcome, tmp_path: Path
) -> None:
    """Each process goes on from what the one before has left, until the next death."""
    command = ["train", root / "toy.yaml", "--runs", tmp_path / "runs"]
    for point, prepare in DEATHS[deaths].items():
        killed = lorafocal_command(*command, prepare=prepare)
        assert killed.code == -signal.SIGKILL, (point, killed.output)
        command = [*command[:4], "--resume"]
    resumed = lorafocal_command(*command)
    assert resumed.code == 0, resumed.output
    assert outcome(tmp_path / "runs") == unbroken


@pytest.mark.row("55", "57")
def test_a_real_process_killed_from_outside_resumes_in_another(root: Path, unbroken: Outcome, tmp_path: Path) -> None:
    command = ["train", str(root / "toy.yaml"), "--runs", str(tmp_path / "runs")]
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorafocal", *command],
            env=os.environ | {"PYTHONPATH": paths},
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
        while not (tmp_path / "runs" / "toy" / "checkpoint-2").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    resumed = lorafocal_command(*command, "--resume")
    assert resumed.code == 0, resumed.output
    ended = outcome(tmp_path / "runs")
    assert (ended.adapter, ended.state, ended.training) == (unbroken.adapter, unbroken.state, unbroken.training)
    assert ended.pairs.items() <= unbroken.pairs.items()  # the killed process kept no record


# --- asked to stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, root: Path, unbroken: Outcome, tmp_path: Path
) -> None:
    in_the_middle = at(FocalPOTrainer, "_part_loss", in_step(5), call=2, do=lambda: os.kill(os.getpid(), number))
    ended = lorafocal_command("train", root / "toy.yaml", "--runs", tmp_path / "runs", prepare=in_the_middle)
    assert ended.code == 128 + number, ended.output
    assert f"stopped and saved after step 5 of {STEPS}" in ended.output
    assert not (tmp_path / "runs" / "toy" / "adapter").exists()
    program, *words = shlex.split(ended.output.splitlines()[-1])
    assert (program, words[-1]) == ("lorafocal", "--resume")
    resumed = lorafocal_command(*words)
    assert resumed.code == 0, resumed.output
    assert "resuming from checkpoint-5" in resumed.output
    assert outcome(tmp_path / "runs") == unbroken


def test_a_reader_that_leaves_ends_no_run(root: Path, unbroken: Outcome, tmp_path: Path) -> None:
    """`lorafocal train run.yaml 2>&1 | head`: what it says is lost, what it makes is not."""

    def read_for_a_while() -> None:
        read, write = os.pipe()
        sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)
        at(FocalPOTrainer, "training_step", in_step(5), do=lambda: os.close(read))()

    ended = lorafocal_command("train", root / "toy.yaml", "--runs", tmp_path / "runs", prepare=read_for_a_while)
    assert ended.code == 0
    assert outcome(tmp_path / "runs") == unbroken


def test_stopped_within_an_epoch_what_the_epoch_ends_with_still_comes(root: Path, tmp_path: Path) -> None:
    """Logged, evaluated and saved by epoch: the part before the signal is in the epoch's means, nothing twice."""
    strategies = {"training__logging_strategy": "epoch", "training__save_strategy": "epoch"}
    config = run_config(root, training__logging_steps=None, training__save_steps=None, **strategies)
    (tmp_path / "epochs.yaml").write_text(resolved_yaml(config))
    words = ["train", tmp_path / "epochs.yaml", "--runs"]
    alone = lorafocal_command(*words, tmp_path / "alone")
    in_the_middle = at(FocalPOTrainer, "training_step", in_step(5), do=lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = lorafocal_command(*words, tmp_path / "runs", prepare=in_the_middle)
    resumed = lorafocal_command(*words, tmp_path / "runs", "--resume")
    assert (alone.code, stopped.code, resumed.code) == (0, 143, 0), resumed.output
    assert outcome(tmp_path / "runs").training == outcome(tmp_path / "alone").training
    evaluated = metric_lines(tmp_path / "runs" / "toy", key="eval_loss")
    assert [line["step"] for line in evaluated] == [3, 6, 9]


# --- broken checkpoints, changed settings -------------------------------------------------------------------


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.safetensors", 100)


def _flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _lose_the_record(checkpoint: Path) -> None:
    (checkpoint / "complete.json").unlink()


@pytest.mark.row("F9")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "optimizer.safetensors has 100 bytes"),
        (_flip_a_byte, "parameters.safetensors has changed since it was written"),
        (_lose_the_record, "complete.json is missing"),
    ],
    ids=["truncated", "flipped", "no record"],
)
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], reason: str, root: Path, copy: Path, unbroken: Outcome
) -> None:
    damage(copy / "toy" / "checkpoint-6")
    resumed = lorafocal_command("train", root / "toy.yaml", "--runs", copy, "--resume")
    assert resumed.code == 0, resumed.output
    assert f"checkpoint-6 is passed over: {reason}" in resumed.output
    assert "resuming from checkpoint-4" in resumed.output
    assert outcome(copy).adapter == unbroken.adapter
    assert outcome(copy).pairs == unbroken.pairs
    assert outcome(copy).training == unbroken.training


def test_what_cannot_reach_the_weights_may_change(root: Path, copy: Path, unbroken: Outcome) -> None:
    resumed = lorafocal_command("train", root / "toy.yaml", "training.logging_steps=1", "--runs", copy, "--resume")
    assert resumed.code == 0, resumed.output
    assert "note: training.logging_steps: 4 -> 1 (allowed" in resumed.output
    assert outcome(copy).adapter == unbroken.adapter
    assert [line["step"] for line in outcome(copy).training] == [3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training__learning_rate": 2e-2}, r"training\.learning_rate: 0\.01 -> 0\.02"),
        ({"objective__beta": 0.2}, r"objective\.beta: 0\.1 -> 0\.2"),
        ({"training__seed": 7}, r"training\.seed: 42 -> 7 \(it decides the adapter's first values\)"),
        ({"training__data_seed": 7}, r"training\.data_seed: 42 -> 7 \(it decides the order of the pairs\)"),
    ],
    ids=["rate", "beta", "seed", "data_seed"],
)
def test_another_result_is_refused_by_name(changes: dict[str, Any], named: str, root: Path, stopped: Path) -> None:
    config = run_config(root, training__save_total_limit=2, **changes)
    with pytest.raises(InputError, match=named):
        run.train(config, resume=True, quiet=True, runs_dir=stopped)


@contextmanager
def altered(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("train.jsonl", lambda rows: rows[: rows.rstrip().rindex(b"\n") + 1], r"data\.train\.pairs: 21 -> 20"),
        ("train.jsonl", lambda rows: rows.replace(b"sort", b"reverse", 1), r"data\.train\.tokens_sha256: "),
        ("base/model.safetensors", lambda weights: weights[:-1] + b"\0", r"base\.sha256: "),
    ],
    ids=["row", "word", "base"],
)
def test_other_data_or_another_base_of_the_same_name_is_refused(
    file: str, change: Callable[[bytes], bytes], named: str, root: Path, stopped: Path
) -> None:
    config = run_config(root, training__save_total_limit=2)
    with altered(root / file, change), pytest.raises(InputError, match=named):
        run.train(config, resume=True, quiet=True, runs_dir=stopped)
