"""Measured runs, each in a process of its own, alternating; medians and spread; one long CSV a benchmark.

A benchmark is a module of this folder with a function `measure(settings) -> {unit: number}`, which `worker.py` calls
in a fresh process, so that peak memory, caches and imports are its own. One that cannot run here raises `Skip` with
the reason, which is recorded instead of a number.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lorafocal.versions import installed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = "lorafocal"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "triton", "unsloth")
SKIPPED = "skipped"
LEAST_S = 60  # that a run may take, however little time is left

Result = dict[str, Any]  # numbers by unit; "_note" goes with them; what else starts with "_" is for checks alone


class Skip(Exception):
    """Raised by `measure` where it cannot run on this machine; says why."""


@dataclass(frozen=True)
class Case:
    """One thing that is measured: who computes, how (in words), and what `measure` is given."""

    implementation: str
    how: str
    settings: Mapping[str, Any]
    batch: str = ""  # what is computed at a time
    tried: bool = False  # whether it may fail, which is then recorded as of a peer


@dataclass(frozen=True)
class Benchmark:
    """A module that measures, what its rows have in common, and in which units ours is put beside the others.

    `better`: +1 for units where more is better, -1 where less is.
    """

    module: str
    columns: Mapping[str, str]  # model, dtype, data
    better: Mapping[str, int]
    check: Callable[[Sequence[Result]], None] = lambda results: None


@dataclass
class Session:
    """Where results go, how often each case is measured, and when to stop."""

    results: Path
    threads: int
    repeats: int
    deadline: float | None = None  # of time.monotonic()
    in_here: bool = False  # instead of in processes of their own: a dry run, or what no process disturbs
    devices: set[str] = field(default_factory=set)

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def options(parser: ArgumentParser) -> ArgumentParser:
    """The options that all benchmarks have."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, one repetition: shows that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="alternating repetitions of every case")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--minutes", type=float, help="no run is started after as many")
    parser.add_argument("--results", type=Path, help="folder of the CSV files; of a dry run nothing is kept without")
    return parser


def model_of(given: Namespace) -> str:
    """The model asked for; by default a tiny one on a CPU, and Llama-3-8B's shapes on a GPU."""
    usual = "llama-3-8b" if given.device == "cuda" else "tiny"
    return "tiny" if given.dry_run else given.model or usual


def dtype_of(given: Namespace) -> str:
    return "bfloat16" if given.device == "cuda" else "float32"


def session(given: Namespace) -> Session:
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    results = given.results
    if results is None:  # figures of a dry run mean nothing
        results = Path(tempfile.mkdtemp(prefix="lorafocal-dry-")) if given.dry_run else HERE / "results"
    return Session(results, given.threads, 1 if given.dry_run else given.repeats, deadline, given.dry_run)


def worker(module: str, settings: Mapping[str, Any], at: Session) -> Result:
    """`module.measure(settings)` in a fresh process on this tree; {"skipped": why} where it cannot run."""
    if at.in_here:
        return measured(module, settings)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(at.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    left_s = None if at.deadline is None else max(LEAST_S, at.deadline - time.monotonic())
    try:
        done = subprocess.run(
            [sys.executable, HERE / "worker.py", module, json.dumps(dict(settings))],
            env=environment, capture_output=True, text=True, timeout=left_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {SKIPPED: "did not end in time"}
    if done.returncode:
        return {SKIPPED: f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:600]}", "_failed": True}
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    at.devices.add(answer["device"])
    return answer["result"]


def measured(module: str, settings: Mapping[str, Any]) -> Result:
    """`module.measure(settings)` in this process."""
    try:
        return import_module(module).measure(dict(settings))
    except Skip as why:
        return {SKIPPED: str(why)}


def alternate(benchmark: Benchmark, cases: Sequence[Case], at: Session, found: list[list[Result]]) -> None:
    """Every case once a repetition, one after the other, into the empty lists of `found`, one a case.

    A case that was skipped is not tried again. Ends the program where one of ours fails, or where they do not agree,
    of which nothing is left.
    """
    for repetition in range(at.repeats):
        for case, results in zip(cases, found, strict=True):
            if len(results) < repetition or (results and SKIPPED in results[0]):
                continue
            if repetition and at.over:
                print(f"time is up in repetition {repetition + 1} of {at.repeats}", flush=True)
                return
            late = at.over and any(found)  # something is always measured
            result = {SKIPPED: "time was up"} if late else worker(benchmark.module, case.settings, at)
            if case.implementation == OURS and "_failed" in result and not case.tried:
                raise SystemExit(f"{benchmark.module}, {case.how}: {result[SKIPPED]}")
            if not (repetition and SKIPPED in result):
                results.append(result)
            print(f"  {case.implementation:<12} {case.how:<44} {_words(result)}", flush=True)
        try:
            benchmark.check([r for results in found for r in results[-1:] if SKIPPED not in r])
        except SystemExit:
            found[:] = [[] for _ in cases]
            raise


def _words(result: Result) -> str:
    if SKIPPED in result:
        return f"skipped: {result[SKIPPED]}"
    return ", ".join(f"{value:.4g} {unit}" for unit, value in result.items() if not unit.startswith("_"))


def rows_of(benchmark: Benchmark, cases: Sequence[Case], measured: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """A row a case and unit, and how many times better each of ours is than each other one, within repetitions."""
    rows = []
    for case, results in zip(cases, measured, strict=True):
        if results and SKIPPED in results[0]:
            rows.append(_row(case, case.implementation, case.how, SKIPPED, [], note=results[0][SKIPPED]))
            continue
        for unit in (unit for unit in (results[0] if results else ()) if not unit.startswith("_")):
            values, note = [r[unit] for r in results], str(results[0].get("_note", ""))
            rows.append(_row(case, case.implementation, case.how, unit, values, note))
    done = [(c, r) for c, r in zip(cases, measured, strict=True) if r and SKIPPED not in r[0]]
    for ours, a in done:
        for theirs, b in done:
            if ours.implementation != OURS or theirs.implementation == OURS:
                continue
            for unit, sign in benchmark.better.items():
                if unit in a[0] and unit in b[0]:
                    ratios = [(x[unit] / y[unit]) ** sign for x, y in zip(a, b, strict=False)]
                    who, how = f"{OURS} / {theirs.implementation}", f"{ours.how} / {theirs.how}"
                    rows.append(_row(ours, who, how, f"x {unit}", ratios))
    common = {"benchmark": benchmark.module, **benchmark.columns}
    return [common | row for row in rows]


def _row(case: Case, who: str, how: str, unit: str, values: list[float], note: str = "") -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
    return {
        "implementation": who,
        "settings": how,
        "batch": case.batch,
        "unit": unit,
        "median": float(f"{statistics.median(values):.5g}") if values else "",
        "spread": float(f"{high - low:.3g}") if values else "",
        "runs": len(values),
        "note": note,
    }


def record(rows: Sequence[Mapping[str, Any]], name: str, at: Session, environment: Mapping[str, str]) -> Path:
    """Append the rows to `results/<name>.csv`; the columns are the same in every file."""
    device = {"device": "; ".join(sorted(at.devices)) or cpu_name()}
    file = at.results / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        names = [*environment, "device", "benchmark", "model", "dtype", "data", "implementation", "settings"]
        names += ["batch", "unit", "median", "spread", "runs", "note"]
        writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**environment, **device, **row} for row in rows)
    return file


def run(benchmark: Benchmark, cases: Sequence[Case], at: Session, *, name: str) -> list[list[Result]]:
    """Measure, record and print; what was measured before the program ends is recorded too."""
    print(f"{benchmark.module}: {', '.join(filter(None, benchmark.columns.values()))}", flush=True)
    environment = environment_columns(at.threads)  # now: the commit may have moved on by the end
    found: list[list[Result]] = [[] for _ in cases]
    try:
        alternate(benchmark, cases, at, found)
    finally:
        rows = rows_of(benchmark, cases, found)
        record(rows, name, at, environment)
    for row in rows:
        if row["unit"].startswith("x "):
            print(f"{row['implementation']:<22} {row['settings']:<64} {row['unit']:<28} {row['median']:>8}")
    return found


def environment_columns(threads: int) -> dict[str, str]:
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": str(threads),
        "python": platform.python_version(),
        **{name: installed(name) or "" for name in LIBRARIES},
    }


def commit() -> str:
    """The commit, with `+changes` where the tree differs from it; empty outside a repository, or without git."""
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "lorafocal", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
