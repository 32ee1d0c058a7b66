"""The command line under torchrun and accelerate, by the commands of docs/several-processes.md."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal import run
from lorafocal.config import load_config, resolved_yaml
from tests.engine import launches
from tests.tiny import relative_difference
from tests.toy_run import HELD_OUT, PAIRS, metric_lines, run_config, write_inputs

pytestmark = pytest.mark.engine

EPOCHS, STEPS = 6, 18
DOCS = launches.REPOSITORY / "docs/several-processes.md"
PROCESSES, TORCHRUN, ACCELERATE, RESUME = re.findall(r"```bash\n(.+)\n```", DOCS.read_text(encoding="utf-8"))
COUNTS = {"rewards/accuracies", "rewards/ties", "focal/turned_share", "pairs_seen", "epoch", "step"}
TIMED = ("_runtime", "_per_second", "pairs_per_s", "peak_gib")

Ended = tuple[int, str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run.yaml` and what it names; held-out pairs are evaluated every epoch by default."""
    folder = write_inputs(tmp_path_factory.mktemp("launched"))
    config = run_config(folder, training__num_train_epochs=EPOCHS, training__dataloader_num_workers=1)
    (folder / "run.yaml").write_text(resolved_yaml(config))
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run folder of one process."""
    return run.train(load_config(root / "run.yaml"), quiet=True, runs_dir=root / "alone").folder


@pytest.fixture(scope="module")
def interrupted(root: Path) -> Ended:
    """Started by accelerate; SIGTERM to the launcher once there is a checkpoint."""
    started = launches.start(ACCELERATE.split(), cwd=str(root))
    deadline = time.monotonic() + launches.LIMIT_S
    while not list((root / "runs").glob("*/checkpoint-2/complete.json")) and time.monotonic() < deadline:
        if started.poll() is not None:
            break
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    return launches.ended(started)


@pytest.fixture(scope="module")
def resumed(root: Path, interrupted: Ended) -> Ended:
    """Gone on with by torchrun, to the end."""
    return launches.run(RESUME.split(), cwd=str(root))


@pytest.fixture(scope="module")
def together(root: Path, resumed: Ended) -> Path:
    assert resumed[0] == 0, resumed[1]
    return root / "runs/toy"


def test_a_signal_to_the_launcher_saves_and_says_how_to_go_on(root: Path, interrupted: Ended) -> None:
    code, output = interrupted
    assert code != 0
    (stopped,) = re.findall(rf"stopped and saved after step (\d+) of {STEPS}; the same run resumes there", output)
    assert f"go on with:\n  {RESUME}\n" in output
    assert output.count("go on with") == 1
    assert "Traceback" not in output.partition("go on with")[0]
    assert int(stopped) < STEPS


@pytest.mark.row("F7", "F8")
def test_two_processes_of_each_launcher_end_in_order(root: Path, together: Path, interrupted: Ended) -> None:
    manifest = json.loads((together / "manifest.json").read_text())
    assert manifest["processes"] == 2
    assert "allowed" not in interrupted[1]


@pytest.mark.row("F1", "F3")
def test_the_adapter_is_that_of_one_process(together: Path, alone: Path) -> None:
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (together, alone))
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    assert relative_difference(ours, theirs) < 1e-6


def test_the_metrics_are_those_of_one_process_line_by_line(together: Path, alone: Path) -> None:
    ours, theirs = (_lines(folder) for folder in (together, alone))
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() - {"pairs_per_s"} == expected.keys() - {"pairs_per_s"}  # none in the first line of a process
        for key, value in expected.items():
            if key.removeprefix("eval_") in COUNTS:
                assert line[key] == value, key
            elif not key.endswith(TIMED):
                assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key  # sums of fp32, some near 0
    assert len([line for line in ours if "eval_loss" in line]) == EPOCHS
    assert ours[-1].keys() != {"step"}
    assert max(line.get("pairs_seen", 0) for line in ours) <= EPOCHS * PAIRS


def test_each_file_is_written_once(together: Path, alone: Path) -> None:
    """The same files with the same numbers of lines; where the run was stopped there is a checkpoint more."""
    ours, theirs = (_files(folder) for folder in (together, alone))
    extra = {name.split("/")[0] for name in ours.keys() - theirs.keys()}
    assert theirs.keys() <= ours.keys()
    assert all(name.startswith("checkpoint-") for name in extra)
    assert len(extra) <= 1
    assert {name: ours[name] for name in theirs if name.endswith(".jsonl")} == {
        name: lines for name, lines in theirs.items() if name.endswith(".jsonl")
    }
    assert ours["held_out.jsonl"] == HELD_OUT
    assert not list(together.glob(".*"))


def test_one_voice(interrupted: Ended, resumed: Ended) -> None:
    """Notes, warnings, progress and the summary are printed once, although two processes run."""
    for code, output in (interrupted, resumed):
        lines = [line for line in output.splitlines() if line.strip()]
        for start in ("train: ", "eval: ", "adapter: ", "evaluation at step 6/"):
            assert sum(line.startswith(start) for line in lines) <= 1, start
        assert sum(line.startswith("train: ") for line in lines) == 1
        ours = lines if code == 0 else [line for line in lines if line.startswith(("step ", "evaluation "))]
        assert len(ours) == len(set(ours))
    assert resumed[1].count(f"{STEPS} steps done") == 1
    assert resumed[1].count("resuming from checkpoint-") == 1


def test_an_error_of_all_ranks_is_said_once_and_ends_all_with_code_2(root: Path) -> None:
    code, output = launches.run([*TORCHRUN.split(), "training.learning_rte=1"], cwd=str(root))
    assert code == 1  # the launcher's
    assert output.count("lorafocal: ") == 1
    assert output.count("unknown key") == 1
    assert "Traceback" not in output.partition("lorafocal: ")[0]
    assert re.findall(r"exitcode\s*: (-?\d+)", output)[-1] == "2"


def test_an_error_before_the_launch_ends_with_code_2_and_starts_nothing(root: Path) -> None:
    """`--processes` reads the config first, and becomes the launcher afterwards."""
    code, output = launches.run([*PROCESSES.split(), "training.learning_rte=1"], cwd=str(root))
    assert code == 2
    assert output.count("lorafocal: ") == 1
    assert "exitcode" not in output
    code, output = launches.run([*PROCESSES.split(), "name=new", "data.train=nowhere.jsonl"], cwd=str(root))
    assert code == 2  # what the processes end with
    assert "lorafocal: data.train: nowhere.jsonl" in output
    assert "Traceback" not in output
    code, output = launches.run([*TORCHRUN.split(), "--processes", "3"], cwd=str(root))
    assert code == 1  # the launcher's
    assert output.count("--processes 3, but a launcher has started 2") == 1


def test_what_cannot_start_right_is_said(root: Path) -> None:
    """A launcher that would start one process of two; and a rank that is alone with its error."""
    silent = _started(root, "accelerate launch --cpu --num_processes 2 -m lorafocal train run.yaml")
    wrong = root / "rank_1_is_wrong.py"
    wrong.write_text(RANK_1_IS_WRONG)
    lonely = _started(root, f"torchrun --standalone --nproc-per-node 2 {wrong} train run.yaml name=new")
    code, output = launches.ended(silent)
    assert code == 1  # accelerate's; the process itself ended with 2, as its message says
    assert output.count("asked for more than one process and started one") == 1
    assert "returned non-zero exit status 2" in output
    code, output = launches.ended(lonely)
    assert code == 1
    assert output.count("rank 1 of 2: lorafocal: ") == output.count("lorafocal: ") == 1
    assert "learning_rte" in output
    assert re.findall(r"exitcode\s*: (-?\d+)", output)[-1] == "2"
    assert not (root / "runs/new").exists()


RANK_1_IS_WRONG = """
import os, sys
from lorafocal import cli, launch
launch.FIRST_SPEAKS_S = 1.0
if os.environ["RANK"] == "1":
    sys.argv.append("training.learning_rte=1")
cli.main()
"""


def _started(root: Path, command: str) -> subprocess.Popen[str]:
    return launches.start(command.split(), cwd=str(root))


def _lines(folder: Path) -> list[Mapping[str, Any]]:
    """Logged lines of training and evaluation; the summary at the end of a call of the trainer is left out."""
    return [line for key in ("loss", "eval_loss") for line in metric_lines(folder, key=key)]


def _files(folder: Path) -> dict[str, int]:
    """Every file below `folder`, with its number of lines; training's summary lines are not counted."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): len(_lines(folder))
        if path.name == "metrics.jsonl"
        else path.read_bytes().count(b"\n")
        for path in files
    }
