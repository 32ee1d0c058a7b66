"""Every benchmark, the most important first: `make bench` on a CPU, `make bench-gpu` within 8 minutes of a GPU.

    python benchmarks/run_all.py [--device cuda] [--minutes 8] [--dry-run]

With `--minutes` each benchmark gets what the earlier ones have left; what there was no time for is recorded as such.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import bench_attention
import bench_logps
import bench_lora
import bench_merge
import bench_packing
import bench_quantized
import bench_reference
import bench_step
import profile_step
from harness import options

Main = Callable[[Sequence[str]], None]

_EIGHT = ["--model", "llama-3-8b", "--data", "256+2x384"]
ON_A_CPU: list[tuple[Main, list[str]]] = [
    (bench_step.main, ["--repeats", "2", "--peers", "--sweep"]),
    (bench_step.main, ["--repeats", "1", "--data", "256+2x384"]),
    (bench_step.main, ["--repeats", "1", "--data", "armorm-like"]),
    (bench_reference.main, ["--repeats", "1"]),
    (bench_lora.main, ["--repeats", "2"]),
    (bench_logps.main, ["--repeats", "2"]),
    (bench_attention.main, ["--repeats", "1"]),
    (bench_packing.main, ["--repeats", "1"]),
    (bench_merge.main, ["--repeats", "2", "--peers"]),
]
ON_A_GPU: list[tuple[Main, list[str]]] = [
    (bench_step.main, [*_EIGHT, "--repeats", "1", "--sweep", "--batches", "8", "4", "--peers"]),
    (bench_quantized.main, ["--repeats", "1"]),
    (profile_step.main, []),
    (bench_lora.main, ["--repeats", "1"]),
    (bench_logps.main, ["--repeats", "1"]),
    (bench_attention.main, ["--repeats", "1", "--data", "256+2x384"]),
    (bench_reference.main, ["--repeats", "1"]),
    (bench_step.main, ["--model", "llama-3.2-1b", "--data", "256+2x384", "--repeats", "1"]),
    (bench_step.main, ["--model", "mistral-7b", "--data", "ultrafeedback-like", "--repeats", "1"]),
]


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="every benchmark"))
    parser.set_defaults(repeats=None)  # each has its own
    given = parser.parse_args(words)
    end = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    device = "cpu" if given.dry_run else given.device  # a dry run of the GPU's list needs none
    shared = ["--device", device, "--threads", str(given.threads)]
    if given.results is not None:
        shared += ["--results", str(given.results)]
    if given.repeats is not None:
        shared += ["--repeats", str(given.repeats)]
    if given.dry_run:
        shared.append("--dry-run")
    for benchmark, own in ON_A_GPU if given.device == "cuda" else ON_A_CPU:
        if end is None:
            benchmark([*own, *shared])
            continue
        left = (end - time.monotonic()) / 60
        if left <= 0:
            print(f"time is up before {benchmark.__module__} {' '.join(own)}")
            continue
        benchmark([*own, *shared, "--minutes", str(left)])


if __name__ == "__main__":
    main()
