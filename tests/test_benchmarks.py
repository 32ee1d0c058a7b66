"""The benchmarks run end to end on tiny shapes, and their harness says what was measured and what was not."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lorafocal.ops.elementwise import TORCH

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", BENCHMARKS / "harness.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["harness"]


@pytest.fixture
def at(harness, tmp_path):
    return harness.Session(tmp_path, threads=1, repeats=3)


def cases_of(harness, *names: str):
    return [harness.Case(name, "so", {"name": name}, "8 pairs") for name in names]


def answers(harness, monkeypatch, given: dict[str, list]) -> None:
    """Let runs of a case answer with what is `given` for it, one after the other."""
    left = {name: iter(results) for name, results in given.items()}
    monkeypatch.setattr(harness, "worker", lambda module, settings, at: next(left[settings["name"]]))


def alternated(harness, benchmark, cases, at) -> list[list]:
    found: list[list] = [[] for _ in cases]
    harness.alternate(benchmark, cases, at, found)
    return found


def test_ratios_are_taken_within_repetitions_and_say_how_much_better_ours_is(harness, at, monkeypatch):
    ours = [{"pairs/s": 8.0, "GiB": 1.0}, {"pairs/s": 4.0, "GiB": 1.0}, {"pairs/s": 6.0, "GiB": 1.0}]
    theirs = [{"pairs/s": 2.0, "GiB": 3.0}, {"pairs/s": 1.0, "GiB": 4.0}, {"pairs/s": 1.0, "GiB": 5.0}]
    answers(harness, monkeypatch, {"lorafocal": ours, "trl": theirs})
    benchmark = harness.Benchmark("fake", {"model": "m"}, {"pairs/s": 1, "GiB": -1})
    cases = cases_of(harness, "lorafocal", "trl")
    rows = harness.rows_of(benchmark, cases, alternated(harness, benchmark, cases, at))
    found = {(row["implementation"], row["unit"]): (row["median"], row["spread"]) for row in rows}
    assert found["lorafocal / trl", "x pairs/s"] == (4.0, 1.0)  # of 4, 4, 6
    assert found["lorafocal / trl", "x GiB"] == (4.0, 1.0)
    assert found["trl", "pairs/s"] == (1.0, 0.5)
    assert {row["runs"] for row in rows} == {3}


def test_what_cannot_run_is_recorded_with_its_reason_and_not_tried_again(harness, at, monkeypatch):
    runs = {"lorafocal": [{"pairs/s": 1.0}] * 3, "liger": [{"skipped": "needs a GPU"}]}
    answers(harness, monkeypatch, runs)
    benchmark = harness.Benchmark("fake", {}, {"pairs/s": 1})
    cases = cases_of(harness, "lorafocal", "liger")
    rows = harness.rows_of(benchmark, cases, alternated(harness, benchmark, cases, at))
    assert [(row["unit"], row["note"]) for row in rows if row["implementation"] == "liger"] == [
        ("skipped", "needs a GPU")
    ]
    assert not any(row["unit"].startswith("x ") for row in rows)


def test_a_peer_that_fails_later_keeps_what_it_had_and_one_of_ours_ends_the_program(harness, at, monkeypatch):
    broken = {"skipped": "failed: out of memory", "_failed": True}
    runs = {"lorafocal": [{"pairs/s": 1.0}] * 3, "trl": [{"pairs/s": 2.0}, broken, broken]}
    answers(harness, monkeypatch, runs)
    benchmark = harness.Benchmark("fake", {}, {"pairs/s": 1})
    cases = cases_of(harness, "lorafocal", "trl")
    rows = harness.rows_of(benchmark, cases, alternated(harness, benchmark, cases, at))
    assert {(row["implementation"], row["runs"]) for row in rows} == {
        ("lorafocal", 3), ("trl", 1), ("lorafocal / trl", 1)
    }  # fmt: skip
    answers(harness, monkeypatch, {"lorafocal": [broken]})
    with pytest.raises(SystemExit, match="out of memory"):
        alternated(harness, benchmark, cases_of(harness, "lorafocal"), at)


@pytest.mark.parametrize("fault", ["fails", "disagrees"])
def test_what_was_measured_before_the_end_is_recorded_unless_it_disagrees(harness, at, monkeypatch, fault):
    broken = {"skipped": "failed: out of memory", "_failed": True}
    ours = [{"pairs/s": 1.0}, broken if fault == "fails" else {"pairs/s": 1.0, "_loss": 2.0}]
    answers(harness, monkeypatch, {"lorafocal": ours, "trl": [{"pairs/s": 2.0}] * 2})

    def check(results) -> None:
        if any("_loss" in result for result in results):
            raise SystemExit("they do not compute the same thing")

    benchmark = harness.Benchmark("fake", {"model": "m"}, {"pairs/s": 1}, check)
    with pytest.raises(SystemExit, match="out of memory" if fault == "fails" else "the same thing"):
        harness.run(benchmark, cases_of(harness, "lorafocal", "trl"), at, name="fake")
    recorded = (at.results / "fake.csv").read_text(encoding="utf-8")
    assert (recorded.count("pairs/s") > 0) is (fault == "fails")


def test_no_repetition_is_begun_when_time_is_up(harness, at, monkeypatch):
    at.deadline = 0.0  # long ago
    answers(harness, monkeypatch, {"lorafocal": [{"pairs/s": 1.0}], "trl": []})
    benchmark = harness.Benchmark("fake", {}, {"pairs/s": 1})
    found = alternated(harness, benchmark, cases_of(harness, "lorafocal", "trl", "lorafocal"), at)
    assert found == [[{"pairs/s": 1.0}], [{"skipped": "time was up"}], [{"skipped": "time was up"}]]


def test_what_only_a_gpu_would_reach_is_there(harness, monkeypatch):
    """A dry run skips Triton's head, so a wrong name would end the first run on a card."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("lorafocal.ops.elementwise.load", lambda name: TORCH)
    heads = importlib.import_module("bench_logps")
    hidden, weight, labels = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    given = [heads.HEADS[name]("cuda")(hidden, weight, labels) for name in ("ours", "ours, triton", "naive")]
    torch.testing.assert_close(given[0], given[1])
    torch.testing.assert_close(given[0], given[2])


def test_a_run_that_hangs_ends_with_the_time_that_was_given(harness, at, monkeypatch):
    at.deadline = 0.0
    monkeypatch.setattr(harness, "LEAST_S", 0.2)
    monkeypatch.setattr(harness, "HERE", at.results)
    (at.results / "worker.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    assert harness.worker("any", {}, at) == {"skipped": "did not end in time"}


def test_repetitions_that_are_asked_for_are_those_of_every_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    everything = importlib.import_module("run_all")
    given: list[list[str]] = []
    monkeypatch.setattr(everything, "ON_A_CPU", [(given.append, ["--repeats", "2"])])
    everything.main(["--repeats", "7"])
    everything.main([])
    asked, usual = (words[::-1] for words in given)
    assert asked[asked.index("--repeats") - 1] == "7"  # the last one counts
    assert usual[usual.index("--repeats") - 1] == "2"


def test_a_step_before_the_clock_is_needed(harness, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit):
        importlib.import_module("bench_step").main(["--dry-run", "--warmup", "0"])


def test_the_sample_of_a_file_makes_as_much_work_as_the_file_does(monkeypatch):
    """Seen where it matters: what rows and their squares, padded and not, the steps after the warm-up compute."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    inputs = importlib.import_module("inputs")
    source = random.Random(7)
    lengths = [(source.randint(2, 200), source.randint(2, 800), source.randint(2, 300)) for _ in range(400)]

    def away(sample: list[int]) -> float:
        """Of the timed steps from the whole data's mean, of twenty orders."""
        trained = [sample[i] for i in inputs.shuffled(24, inputs.SEED, 0)][8:]
        orders = [inputs.work([lengths[i] for i in inputs.shuffled(400, seed, 1)], 8) for seed in range(20)]
        whole = [sum(column) / (20 * 400) for column in zip(*orders, strict=True)]
        own = inputs.work([lengths[i] for i in trained], 8)
        return max(abs(value / 16 / mean - 1) for value, mean in zip(own, whole, strict=True))

    sample = inputs.like_the_whole(lengths, 24, 8, 1)
    assert sample == inputs.like_the_whole(lengths, 24, 8, 1)
    assert len(set(sample)) == 24
    assert away(sample) < 0.05
    assert sorted(away(inputs.shuffled(400, seed, 0)[:24]) for seed in range(9))[4] > 0.1  # what chance gives


@pytest.mark.engine
def test_a_run_is_a_process_of_its_own(harness, at):
    answer = harness.worker("bench_packing", {"fill": "ours", "budget": 8, "steps": [[3, 5, 4, 4]]}, at)
    assert answer["share filled"] == 1.0
    assert at.devices == {harness.cpu_name()}


@pytest.mark.engine
def test_a_run_finds_packages_where_its_caller_does(harness, at, tmp_path, monkeypatch):
    """On a lent machine the peers lie in a folder that PYTHONPATH names."""
    (tmp_path / "bench_elsewhere.py").write_text("def measure(settings): return {'pairs/s': 1.0}", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert harness.worker("bench_elsewhere", {}, at) == {"pairs/s": 1.0}


def test_unsloth_comes_before_what_it_changes(tmp_path):
    (tmp_path / "unsloth.py").write_text("import sys; TOO_LATE = {'transformers', 'peft', 'trl'} & sys.modules.keys()")
    asked = {"implementation": "unsloth", "device": "cuda"}
    code = f"import worker; worker.begin({asked}); print(worker.sys.modules['unsloth'].TOO_LATE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, BENCHMARKS, BENCHMARKS.parent)))},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


@pytest.mark.engine
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_runs_dry(device, tmp_path):
    """The GPU's list too, on a CPU: what it would do there, on tiny shapes."""
    words = ["--dry-run", "--device", device, "--results", str(tmp_path)]
    subprocess.run(
        [sys.executable, BENCHMARKS / "run_all.py", *words],
        check=True, capture_output=True, cwd=BENCHMARKS.parent, env=None,
    )  # fmt: skip
    files = {"step", "step_sweep", "reference", "lora", "logps", "attention"}
    files |= {"quantized", "profile"} if device == "cuda" else {"packing", "merge"}
    assert {file.stem for file in tmp_path.glob("*.csv")} == files
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        ours = any(row["implementation"] == "lorafocal" and row["unit"] != "skipped" for row in rows)
        assert ours or file.stem == "step_sweep", file.name
        assert all(row["median"] or row["note"] for row in rows), file.name
        assert not any("failed" in row["note"] for row in rows), file.name
    subprocess.run(
        [sys.executable, BENCHMARKS / "draw.py", "--results", tmp_path, "--to", tmp_path],
        check=True,
        capture_output=True,
    )
    assert list(tmp_path.glob("step-pairs-s-*.svg"))
