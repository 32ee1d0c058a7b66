"""Training on an NF4 base beside bf16, and under memory caps at the library's own choice of tokens and tier.

    python benchmarks/bench_quantized.py --device cuda [--caps 24 12]

A cap is one of PyTorch's allocator; everything the run allocates counts, the base included.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

from bench_step import measure, our_steps, ours
from harness import Benchmark, Case, options, run, session
from shapes import SHAPES

__all__ = ["measure"]  # a step's

UNCAPPED_STEPS, CAPPED_STEPS = 5, 20


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="an NF4 base beside bf16, and under memory caps"))
    parser.add_argument("--model", choices=tuple(SHAPES), help="default: tiny on a CPU, llama-3-8b on a GPU")
    parser.add_argument("--caps", type=float, nargs="*", default=[24, 12], help="GiB of a GPU")
    given = parser.parse_args(words)
    at, gpu = session(given), given.device == "cuda"
    steps = 2 if given.dry_run else CAPPED_STEPS if gpu else UNCAPPED_STEPS
    with tempfile.TemporaryDirectory() as folder:
        columns, settings = our_steps(given, folder, at, steps)
        capped = {**settings, "warmup": 1}
        whole = {**capped, "steps": min(steps, UNCAPPED_STEPS)}
        cases: list[Case] = [
            ours(whole, stored=True, how=f"{columns['dtype']} base"),
            ours(whole, stored=True, how="NF4 base", quantization="nf4"),
        ]
        cases += [
            ours(capped, stored=False, how=f"NF4 base, cap {cap:g} GiB, {steps} steps", quantization="nf4", cap_gib=cap)
            for cap in (given.caps if gpu else [])
        ]
        run(Benchmark("bench_quantized", columns, {}), cases, at, name="quantized")


if __name__ == "__main__":
    main()
