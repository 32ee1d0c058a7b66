"""The status line a person watches and the file a program reads."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafocal.progress import (
    LossWithEvaluation,
    MetricsFile,
    ProgressLine,
    Speed,
    StepClock,
    clock_text,
    evaluation_line,
    fitted,
    loss_gap,
    metrics_line,
    peak_gib,
    status_line,
    tell,
)
from tests.tiny import pairs, trainer

CONTROL = TrainerControl()
TRAIN_LOGS = {"loss": 0.6123, "rewards/margins": 0.41, "rewards/accuracies": 0.78, "learning_rate": 2e-4}


def state_at(step: int, of: int = 100, *, first_process: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=of, is_world_process_zero=first_process)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


# --- the line -----------------------------------------------------------------------------------------------


@pytest.mark.row("63")
def test_the_whole_line() -> None:
    line = status_line(
        37, 100, pairs_per_s=12.34, eta_s=11.2, loss=0.61234, margin=0.414, accuracy=0.781, peak_gib=1.23
    )
    assert line == "step 37/100 · 12.3 pairs/s · ETA 0:12 · loss 0.6123 · margin +0.41 · acc 78% · 1.2 GiB"


@pytest.mark.row("63")
def test_unknown_parts_are_left_out_and_odd_numbers_are_shown() -> None:
    assert status_line(0, 5) == "step 0/5"
    assert status_line(1, 5, margin=-0.5, pairs_per_s=1234.5) == "step 1/5 · 1234 pairs/s · margin -0.50"
    assert status_line(1, 5, loss=math.nan, accuracy=0.0) == "step 1/5 · loss nan · acc 0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0:00"),
        (0, "0:00"),
        (0.2, "0:01"),
        (59.5, "1:00"),
        (61, "1:01"),
        (3599.9, "1:00:00"),
        (93784, "26:03:04"),
    ],
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_evaluation_line() -> None:
    logs = {
        "eval_loss": 0.601,
        "eval_rewards/margins": 0.41,
        "eval_rewards/accuracies": 0.78,
        "eval_runtime": 3.0,
    }
    assert evaluation_line(50, 100, logs) == "evaluation at step 50/100 · loss 0.6010 · margin +0.41 · acc 78%"


def test_the_gap_is_held_out_loss_minus_the_mean_over_pairs_since_the_last_evaluation() -> None:
    """Weighted by pairs, whatever the logging interval; a second evaluation starts anew."""
    first = [{"loss": 0.7, "pairs_seen": 30}, {"loss": 0.5, "pairs_seen": 40}, {"eval_loss": 0.66}]
    assert loss_gap(first) == pytest.approx(0.66 - (30 * 0.7 + 10 * 0.5) / 40)
    second = [*first, {"loss": 0.3, "pairs_seen": 50}, {"eval_loss": 0.68}]
    assert loss_gap(second) == pytest.approx(0.68 - 0.3)
    assert loss_gap([*second, {"eval_loss": 0.68}]) == pytest.approx(0.68 - 0.3)  # evaluated again at the end
    assert loss_gap([]) is loss_gap([{"eval_loss": 0.7}]) is loss_gap(first[:2]) is None
    assert evaluation_line(3, 9, {"eval_loss": 0.66}, gap=0.0123) == "evaluation at step 3/9 · loss 0.6600 · gap +0.012"


@pytest.mark.slow
@pytest.mark.row("18")
def test_pairs_learned_by_heart_show_as_a_gap_that_grows_over_epochs(tmp_path: Path) -> None:
    """Each evaluation has a training loss logged beside it, of every pair since the one before."""
    stream = io.StringIO()
    settings = {"num_train_epochs": 3, "max_steps": -1, "logging_steps": 50, "eval_strategy": "epoch"}
    made = trainer(tmp_path, pairs(20), pairs(20, seed=2), **settings)
    for callback in (LossWithEvaluation(), ProgressLine(stream)):
        made.add_callback(callback)
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line or "eval_loss" in line]
    assert [("loss" in line, line["step"]) for line in lines] == [(n % 2 == 0, 3 * (n // 2 + 1)) for n in range(6)]
    assert [line["pairs_seen"] for line in lines[::2]] == [20, 40, 60]
    gaps = [loss_gap(lines[: 2 * epoch]) for epoch in (1, 2, 3)]
    assert gaps == [lines[n + 1]["eval_loss"] - lines[n]["loss"] for n in (0, 2, 4)]
    assert abs(gaps[0]) < gaps[1] < gaps[2]
    assert stream.getvalue().count(" · gap +") >= 2


def test_peak_memory_is_that_of_a_process_with_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # an earlier test may have used a GPU
    assert 0.05 < peak_gib() < 64


def test_beside_an_idle_gpu_peak_memory_is_the_process_s(monkeypatch):
    resident = peak_gib()
    for name, value in (("is_available", True), ("is_initialized", True), ("max_memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert peak_gib() >= resident > 0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    assert peak_gib() == 2


# --- speed and remaining time -------------------------------------------------------------------------------


def test_the_clock_leaves_pauses_out_and_looks_at_the_last_steps() -> None:
    clock = StepClock()
    assert clock.step_s is None
    now = 5.0
    clock.resume(now)
    for step in range(30):
        now += 8.0 if step < 10 else 2.0
        clock.step(now)
        now += 60.0  # an evaluation
        clock.resume(now)
    assert clock.step_s == pytest.approx(2.0)
    assert clock.trained_s == pytest.approx(10 * 8 + 20 * 2)


def run_line(line: ProgressLine, now: Clock, *, steps: int = 4) -> None:
    """What a trainer does: a step takes 2 s, and every second one a 100 s evaluation and save after it."""
    args: Any = SimpleNamespace(pairs_per_step=16)
    line.on_train_begin(args, state_at(0), CONTROL)
    for step in range(1, steps + 1):
        now.time += 2.0
        line.on_step_end(args, state_at(step), CONTROL)
        line.on_log(args, state_at(step), CONTROL, logs=TRAIN_LOGS)
        if step % 2 == 0:
            now.time += 90.0
            line.on_log(args, state_at(step), CONTROL, logs={"eval_loss": 0.5})
            line.on_evaluate(args, state_at(step), CONTROL)
            now.time += 10.0
            line.on_save(args, state_at(step), CONTROL)
    line.on_train_end(args, state_at(steps), CONTROL)


@pytest.mark.row("63")
def test_without_a_terminal_one_plain_line_a_logged_event() -> None:
    out, now = io.StringIO(), Clock()
    run_line(ProgressLine(out, now=now), now)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert re.fullmatch(
        r"step 4/100 · 8\.0 pairs/s · ETA 3:12 · loss 0\.6123 · margin \+0\.41 · acc 78% · \d+\.\d GiB",
        lines[4],
    )
    assert lines[5] == "evaluation at step 4/100 · loss 0.5000"
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.row("63")
def test_on_a_terminal_the_line_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out, now = Terminal(), Clock()
    run_line(ProgressLine(out, now=now), now)
    text = out.getvalue()
    assert text.count("\n") == 3  # two evaluations and the end
    drawn = re.split(r"\r\x1b\[2K|\n", text)
    assert max(map(len, drawn)) <= 39  # a wrapped line cannot be redrawn
    assert sum(part.startswith("step ") for part in drawn) == 8


def test_quiet_and_other_processes_say_nothing() -> None:
    out, now = Terminal(), Clock()
    run_line(ProgressLine(out, quiet=True, now=now), now)
    other = ProgressLine(out, now=now)
    other.on_log(SimpleNamespace(), state_at(1, first_process=False), CONTROL, logs=TRAIN_LOGS)
    assert out.getvalue() == ""


def test_a_reader_that_leaves_ends_no_run() -> None:
    """As `head` does; nothing is left in the stream's buffer that would fail at the end."""
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as out:
        line, now = ProgressLine(out), Clock()
        line.say("read")
        assert os.read(read, 9) == b"read\n"
        os.close(read)
        line.say("not read")
        run_line(ProgressLine(out, now=now), now)
        out.write("by a library\n")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_stream_that_is_no_file_may_break_too(number: int) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "gone")

    tell(Gone(), "words")
    number = errno.ENOSPC  # somebody's log is to be whole
    with pytest.raises(OSError, match="gone"):
        tell(Gone(), "words")


def test_a_stream_that_was_closed_from_the_start_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    now = Clock()
    run_line(ProgressLine(now=now), now)


def test_a_logged_speed_is_shown() -> None:
    out, now = io.StringIO(), Clock()
    line = ProgressLine(out, now=now)
    line.on_log(SimpleNamespace(), state_at(1), CONTROL, logs=TRAIN_LOGS | {"pairs_per_s": 77.7})
    assert "· 77.7 pairs/s ·" in out.getvalue()


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def strict(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_one_sorted_valid_object_a_line() -> None:
    logs = {
        "rewards/margins": np.float32(0.5),
        "loss": math.nan,
        "grad_norm": torch.tensor(math.inf),
        "learning_rate": np.float64(1e-4),
        "epoch": 0.5,
        "focal/turned_share": torch.tensor(0.25),
        "pairs_seen": np.int64(64),
    }
    line = metrics_line(7, logs)
    assert line.count("\n") == 1
    assert line.endswith("}\n")
    read = strict(line)
    assert list(read) == sorted([*logs, "step"])
    assert read == {
        "epoch": 0.5,
        "focal/turned_share": 0.25,
        "grad_norm": None,
        "learning_rate": 1e-4,
        "loss": None,
        "pairs_seen": 64,
        "rewards/margins": 0.5,
        "step": 7,
    }


def test_on_resume_the_file_is_the_lineage(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    args: Any = SimpleNamespace()
    metrics.on_train_begin(args, state_at(0), CONTROL)
    for step in range(1, 6):
        metrics.on_log(args, state_at(step), CONTROL, logs={"loss": 1.0 / step})
    metrics.on_log(args, state_at(6, first_process=False), CONTROL, logs={"loss": 0.0})
    with metrics.path.open("a") as file:
        file.write('{"loss": 0.1, "st')  # killed while writing
    resumed = MetricsFile(metrics.path.parent)
    resumed.on_train_begin(args, state_at(3), CONTROL)
    for step in (4, 5):
        resumed.on_log(args, state_at(step), CONTROL, logs={"loss": 2.0 / step})
    read = [strict(line) for line in metrics.path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in read] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.5),
        (5, 0.4),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_goes_on_keeps_no_summary_of_its_interruptions(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    args: Any = SimpleNamespace()
    for step in (0, 2, 4):  # two signals, and the end
        metrics.on_train_begin(args, state_at(step), CONTROL)
        metrics.on_log(args, state_at(step + 2), CONTROL, logs={"loss": 1.0})
        metrics.on_log(args, state_at(step + 2), CONTROL, logs={"train_runtime": 1.0, "train_steps_per_second": 2.0})
        metrics.on_train_end(args, state_at(step + 2), CONTROL)
    read = [strict(line) for line in metrics.path.read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in read] == [(2, True), (4, True), (6, True), (6, False)]


@pytest.mark.parametrize("torn", ['{"step": 1}', "null\n", "[]\n", "not json\n", '{"epoch": 1}\n', '{"step": "x"}\n'])
def test_lines_that_are_not_whole_are_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    MetricsFile(path.parent).rewind(3)
    assert path.read_text() == '{"step": 1}\n'


def test_a_fresh_start_keeps_nothing_not_even_an_evaluation_before_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"eval_loss": 0.7, "step": 0}\n{"loss": 0.6, "step": 1}\n')
    MetricsFile(path.parent).rewind(0)
    assert path.read_text() == ""


def test_speed_is_that_of_each_training_by_itself() -> None:
    """A second call counts its pairs anew: less than the first's."""
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    speed = Speed(now=lambda: next(times))
    for seen in (100, 10):
        called: tuple[Any, Any, Any] = (None, TrainerState(), TrainerControl())
        speed.on_train_begin(*called)
        speed.on_step_end(*called)
        assert "pairs_per_s" not in speed.measured(seen)


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2):
        metrics.append(step, {"loss": 1.0})
        assert len(metrics.path.read_text().splitlines()) == step


# --- in transformers' own loop ------------------------------------------------------------------------------


class Square(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, return_loss: bool = True) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


def test_in_a_real_training_loop(tmp_path: Path) -> None:
    out = io.StringIO()
    callbacks: list[TrainerCallback] = [MetricsFile(tmp_path), ProgressLine(out)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"x": torch.ones(1)} for _ in range(8)]
    Trainer(Square(), args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks).train()
    read = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in read] == [1, 2, 2, 3, 4, 4, 4]
    assert all({"loss", "grad_norm", "learning_rate", "epoch"} <= line.keys() for line in read if "loss" in line)
    assert [line["step"] for line in read if "eval_loss" in line] == [2, 4]
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        *("step 1/4", "step 2/4", "evaluation at step 2/4", "step 3/4", "step 4/4", "evaluation at step 4/4")
    ]
    assert "ETA 0:00" in lines[-2]


def test_a_narrow_terminal_loses_whole_fields() -> None:
    line = "step 1/2 · 12.3 pairs/s · 0.6 GiB"
    assert fitted(line, 80) == line
    assert fitted(line, 30) == "step 1/2 · 12.3 pairs/s"
    assert fitted(line, 5) == "step "
