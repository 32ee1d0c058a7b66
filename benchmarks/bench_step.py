"""Pairs a second and peak memory of a training step beside TRL's `DPOTrainer` (see README.md in this folder).

    python benchmarks/bench_step.py [--data FILE --label NAME] [--grid] [--repeats 3]

This file imports nothing heavy: it starts one process a run, alternates the two implementations, refuses to go on
where they do not compute the same loss, and appends medians to `results/bench_step.csv`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "bench_step.csv"

PAIRS_PER_STEP = 8  # TRL's default step: one batch of 8
LOSS_TOLERANCE = 1e-4  # of a loss near 1: fp32 sums of thousands of nats, times beta
RATES = ("pairs/s", "pairs/s, reference pass included", "pairs/CPU s")
TRL_DEFAULT = {"implementation": "trl", "batch": 8, "precompute": False}
TRL_GRID = [
    {"implementation": "trl", "batch": batch, "precompute": precompute}
    for precompute in (False, True)
    for batch in (8, 4, 2, 1)
]

Result = dict[str, float]
Couple = tuple[Result, Result]  # ours and theirs, one right after the other


def worker(settings: dict[str, object], threads: int) -> dict[str, float]:
    """Run `step_worker.py` in its own process, on this tree; its result."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, HERE / "step_worker.py", json.dumps(settings)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"a run failed: {json.dumps(settings)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_same(a: Result, b: Result) -> None:
    """Both trained on the same tokens, and their first step has the same loss."""
    if a["tokens"] != b["tokens"] or abs(a["first_loss"] - b["first_loss"]) > LOSS_TOLERANCE:
        raise SystemExit(f"the implementations do not compute the same thing: {a} and {b}")


def alternate(
    common: dict[str, object], others: list[dict[str, object]], repeats: int, threads: int
) -> list[list[tuple]]:
    """For each of `others`, one (ours, theirs) a repetition, always one right after the other."""

    def run(settings: dict[str, object], **more: object) -> Result:
        result = worker({**common, **settings, **more}, threads)
        print(f"  {describe(settings):<42} {result['pairs/s']:8.3f} pairs/s {result['peak_gib']:7.2f} GiB", flush=True)
        return result

    ours = {"implementation": "lorafocal"}
    print("check of the first two losses:", flush=True)
    reference = run(ours, steps=2, warmup=1)
    check_same(reference, run(others[0], steps=2, warmup=1))
    measured: list[list[Couple]] = [[] for _ in others]
    for repetition in range(repeats):
        print(f"repetition {repetition + 1} of {repeats}:", flush=True)
        for settings, pairs_of_runs in zip(others, measured, strict=True):
            pairs_of_runs.append((run(ours), run(settings)))
            for result in pairs_of_runs[-1]:
                check_same(reference, result)
    return measured


def describe(settings: dict[str, object]) -> str:
    if settings["implementation"] == "lorafocal":
        return "lorafocal: packs, live reference"
    reference = "precomputed" if settings["precompute"] else "live"
    return f"trl: batch {settings['batch']}, {reference} reference"


def rows_of(settings: dict[str, object], runs: list[Couple]) -> list[dict[str, object]]:
    """The rows of one TRL setting: its rates, and how many times faster ours is."""
    ours, theirs = zip(*runs, strict=True)
    name, what = "trl", describe(settings).partition(": ")[2]
    rows = []
    for unit in RATES:
        rows.append(row(name, what, unit, [r[unit] for r in theirs], theirs))
        ratios = [a[unit] / b[unit] for a, b in runs]
        rows.append(row("lorafocal / trl", what, f"x {unit}", ratios, ours))
    if not settings["precompute"]:
        rows = [r for r in rows if "reference pass" not in str(r["unit"])]
    return rows


def row(name: str, what: str, unit: str, values: list[float], runs: list[Result]) -> dict[str, object]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "implementation": name,
        "settings": what,
        "unit": unit,
        "median": round(statistics.median(values), 4),
        "spread": round(high - low, 4),
        "peak_gib": round(statistics.median(r["peak_gib"] for r in runs), 3),
    }


def environment_columns(threads: int) -> dict[str, object]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        **libraries,
    }


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "lorafocal", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def append(rows: list[dict[str, object]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pairs a second and peak memory of a training step, beside TRL's")
    parser.add_argument("--data", type=Path, help="preference rows (.jsonl, .json, .parquet); default: synthetic ones")
    parser.add_argument("--label", help="what the results call the data; never its path")
    parser.add_argument("--grid", action="store_true", help="TRL at batch 1, 2, 4, 8, reference live and precomputed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed optimiser steps a run, of 8 pairs each")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and one answer")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    label = given.label or ("own data" if given.data else "synthetic")
    pairs = (given.steps + given.warmup) * PAIRS_PER_STEP
    others = TRL_GRID if given.grid else [TRL_DEFAULT]
    columns = environment_columns(given.threads)  # now: the commit may have moved on by the end
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"folder": folder, "max_length": given.max_length}
        data = str(given.data.resolve()) if given.data else None
        lengths = worker({"implementation": "prepare", "data": data, "pairs": pairs, **inputs}, given.threads)
        print(f"{label}: {pairs} pairs, mean tokens {lengths}")
        common = {
            "steps": given.steps + given.warmup, "warmup": given.warmup, "threads": given.threads,
            "pairs_per_step": PAIRS_PER_STEP, **inputs,
        }  # fmt: skip
        measured = alternate(common, others, given.repeats, given.threads)
    ours = [run for runs in measured for run, _ in runs]
    rows = [
        row("lorafocal", "packs, live reference", unit, [r[unit] for r in ours], ours)
        for unit in ("pairs/s", "pairs/CPU s")
    ]
    for settings, runs in zip(others, measured, strict=True):
        rows += rows_of(settings, runs)
    data_columns = {"data": label, "max_length": given.max_length, "pairs": given.steps * PAIRS_PER_STEP}
    ordered = [columns | {k: r[k] for k in ("implementation", "settings")} | data_columns | r for r in rows]
    append(ordered)
    print()
    for r in rows:
        measured_as = f"{r['unit']:<36} {r['median']:>9} +- {r['spread']:<8} {r['peak_gib']} GiB"
        print(f"{r['implementation']:<16} {r['settings']:<32} {measured_as}")


if __name__ == "__main__":
    main()
