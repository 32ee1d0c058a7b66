"""Where a step's time goes: share of matrix products, attention, everything else, and the operations that cost most.

python benchmarks/profile_step.py [--device cuda]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from bench_step import our_steps
from harness import OURS, Benchmark, Case, Result, options, run, session
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

SHOWN = 15  # single operations
KINDS = {  # words in the names of kernels and operators, first match wins
    "attention": ("attention", "flash", "fmha", "attn"),
    "matrix products": (
        "gemm",
        "::mm",
        "::addmm",
        "::bmm",
        "cutlass",
        "nvjet",
        "cublas",
        "ampere_",
        "sm80_xmma",
        "sm90_",
    ),
    "copies and memory": ("memcpy", "memset", "copy", "::cat", "fill"),
    "4-bit weights": ("dequant", "quantize"),
}


def measure(settings: dict[str, Any]) -> Result:
    """Per cent of the device's busy time, of the steps after the warm-up."""
    from trainers import Job, Watch, our_trainer

    asked = dict(settings)
    torch.set_num_threads(asked.pop("threads"))
    job = Job(**asked)
    gpu = job.device == "cuda"
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as output:
        trainer, _ = our_trainer(job, output)
        profiler = profile(activities=activities)

        class Window(Watch):
            """Profiles from the end of the first step."""

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if not self.ends:
                    profiler.start()  # before the clock: it takes a while on a GPU
                self.tick()
                if len(self.ends) == job.steps:
                    profiler.stop()

        window = Window(job.device)
        trainer.add_callback(window)
        trainer.train()
    spent = [
        (event.key, (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6)
        for event in profiler.key_averages()
    ]
    return shares(spent, window.since(1)[0], gpu)


def shares(spent: Sequence[tuple[str, float]], wall_s: float, gpu: bool) -> Result:
    """Per cent by kind and of the largest operations; on a GPU also how much of the time it was busy."""
    busy = sum(seconds for _, seconds in spent)
    kinds = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for name, seconds in spent:
        kinds[kind_of(name)] += seconds
    result = {f"% {kind}": 100 * seconds / busy for kind, seconds in kinds.items()}
    if gpu:
        result["% of the wall time busy"] = 100 * busy / wall_s
    for name, seconds in sorted(spent, key=lambda entry: -entry[1])[:SHOWN]:
        result[f"% {name[:80]}"] = 100 * seconds / busy
    return result


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in lower for w in words)), "everything else")


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="where a step's time goes"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    given = parser.parse_args(words)
    at = session(given)
    at.repeats = 1
    with tempfile.TemporaryDirectory() as folder:
        columns, settings = our_steps(given, folder, at, 2 if given.dry_run else 3)
        kinds = {"live reference": "disabled_adapter", "stored reference": "cached"}
        cases = [Case(OURS, how, {**settings, "reference": kind}, "packs, auto") for how, kind in kinds.items()]
        run(Benchmark("profile_step", columns, {}), cases, at, name="profile")


if __name__ == "__main__":
    main()
