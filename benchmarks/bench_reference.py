"""The reference live and from the store: steps a second, how fast a store is built and read, its size on disk.

python benchmarks/bench_reference.py [--device cuda] [--data ultrafeedback-like]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_step import PAIRS_PER_STEP, vocabulary_of
from harness import OURS, Benchmark, Case, Result, dtype_of, model_of, options, run, session, worker
from inputs import DISTRIBUTIONS
from shapes import SHAPES

WORDS = {"disabled_adapter": "live reference", "cached": "stored reference"}


def measure(settings: dict[str, Any]) -> Result:
    """Steps after the warm-up; of a store, its building, a look-up of everything, and its bytes."""
    from trainers import Job, Watch, our_trainer

    asked = dict(settings)
    warmup = asked.pop("warmup")
    torch.set_num_threads(asked.pop("threads"))
    job = Job(**asked)
    result: Result = {}
    with tempfile.TemporaryDirectory() as output:
        trainer, building_s = our_trainer(job, output)
        pairs = len(trainer.train_dataset)
        if job.reference == "cached":
            start = time.perf_counter()
            trainer.stored.store.look_up(trainer.train_dataset)
            result["look-ups, pairs/s"] = pairs / (time.perf_counter() - start)
            result["building, pairs/s"] = pairs / building_s
            files = [file for file in Path(output, "store").rglob("*") if file.is_file()]
            result["bytes a pair on disk"] = sum(file.stat().st_size for file in files) / pairs
        watch = Watch(job.device)
        trainer.add_callback(watch)
        trainer.train()
    return {"pairs/s": (job.steps - warmup) * job.pairs_per_step / watch.since(warmup)[0], **result}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="the reference live and from the store"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    parser.add_argument("--data", default="ultrafeedback-like", help="a distribution's name, or a file of preferences")
    parser.add_argument("--label", help="what the results call a file; its path is never recorded")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    given = parser.parse_args(words)
    at = session(given)
    model = model_of(given)
    data = "tiny" if given.dry_run else given.data
    label = data if data in DISTRIBUTIONS else given.label or "own data"
    steps = 2 if given.dry_run else given.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        drawn = {
            "folder": folder, "data": data if data in DISTRIBUTIONS else str(Path(data).resolve()),
            "pairs": steps * PAIRS_PER_STEP, "max_length": 1024, "vocabulary": vocabulary_of(model),
        }  # fmt: skip
        worker("inputs", drawn, at)
        dtype = dtype_of(given)
        common = {
            "folder": folder, "model": model, "dtype": dtype, "device": given.device, "threads": given.threads,
            "steps": steps, "warmup": 1, "pairs_per_step": PAIRS_PER_STEP, "max_length": 1024,
            "layers": 2 if given.dry_run else None,
        }  # fmt: skip
        cases = [Case(OURS, how, {**common, "reference": kind}, "packs, auto") for kind, how in WORDS.items()]
        run(Benchmark("bench_reference", {"model": model, "dtype": dtype, "data": label}, {}), cases, at,
            name="reference")  # fmt: skip


if __name__ == "__main__":
    main()
