"""Training on an NF4 base beside bf16, and under memory caps at the library's own choice of tokens and tier.

    python benchmarks/bench_quantized.py --device cuda [--caps 24 12]

A cap is one of PyTorch's allocator; everything the run allocates counts, the base included.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from bench_step import PAIRS_PER_STEP, measure, ours, vocabulary_of
from harness import Benchmark, Case, dtype_of, model_of, options, run, session, worker
from shapes import SHAPES

__all__ = ["measure"]  # a step's

UNCAPPED_STEPS, CAPPED_STEPS = 5, 20


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="an NF4 base beside bf16, and under memory caps"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    parser.add_argument("--caps", type=float, nargs="*", default=[24, 12], help="GiB of a GPU")
    given = parser.parse_args(words)
    at, gpu = session(given), given.device == "cuda"
    model = model_of(given)
    data = "tiny" if given.dry_run else "256+2x384"
    steps = 2 if given.dry_run else CAPPED_STEPS if gpu else UNCAPPED_STEPS
    dtype = dtype_of(given)
    with tempfile.TemporaryDirectory() as folder:
        drawn = {
            "folder": folder, "data": data, "pairs": steps * PAIRS_PER_STEP, "max_length": 1024,
            "vocabulary": vocabulary_of(model),
        }  # fmt: skip
        worker("inputs", drawn, at)
        common: dict[str, Any] = {
            "folder": folder, "model": model, "dtype": dtype, "device": given.device, "threads": given.threads,
            "steps": min(steps, UNCAPPED_STEPS), "warmup": 1, "pairs_per_step": PAIRS_PER_STEP, "max_length": 1024,
            "layers": 2 if given.dry_run else None,
        }  # fmt: skip
        cases: list[Case] = [
            ours(common, stored=True, how=f"{dtype} base"),
            ours(common, stored=True, how="NF4 base", quantization="nf4"),
        ]
        cases += [
            ours({**common, "steps": steps}, stored=False, how=f"NF4 base, cap {cap:g} GiB, {steps} steps",
                 quantization="nf4", cap_gib=cap)
            for cap in (given.caps if gpu else [])
        ]  # fmt: skip
        run(Benchmark("bench_quantized", {"model": model, "dtype": dtype, "data": data}, {}), cases, at,
            name="quantized")  # fmt: skip


if __name__ == "__main__":
    main()
