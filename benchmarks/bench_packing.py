"""Our bins beside the usual ways to fill them: share of the rows that are used, levelness, and speed.

    python benchmarks/bench_packing.py [--data pairs.jsonl --label my-pairs]

A step's pairs are put into packs of a token budget. What is not used is not computed, but fewer, fuller packs waste
less of a GPU, and level ones keep several GPUs from waiting for each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench_attention import drawn_lengths
from harness import OURS, Benchmark, Case, Result, options, run, session
from inputs import DISTRIBUTIONS
from measuring import seconds

Fill = Callable[[list[int], int], list[list[int]]]


def measure(settings: dict[str, Any]) -> Result:
    """Means over steps."""
    fill, budget = FILLS[settings["fill"]], settings["budget"]
    steps: list[list[int]] = settings["steps"]
    made = [[[step[i] for i in members] for members in fill(step, budget)] for step in steps]
    packs = [pack for bins in made for pack in bins]
    level = [max(map(sum, bins)) / (sum(map(sum, bins)) / len(bins)) for bins in made]
    pairs = sum(map(len, steps))
    return {
        "share filled": sum(map(sum, packs)) / (budget * len(packs)),
        "packs a step": len(packs) / len(steps),
        "fullest / mean": sum(level) / len(level),
        "pairs placed/s": pairs / seconds(lambda: [fill(step, budget) for step in steps], "cpu"),
    }


def _ours(lengths: list[int], budget: int) -> list[list[int]]:
    from lorafocal.data.bins import fill_bins

    return fill_bins(lengths, budget)


def _first_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """Into the first bin that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item, length in enumerate(lengths):
        at = next((i for i, free in enumerate(room) if free >= length), None)
        if at is None:
            bins.append([item])
            room.append(budget - length)
        else:
            bins[at].append(item)
            room[at] -= length
    return bins


def _first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [[order[i] for i in members] for members in _first_fit([lengths[i] for i in order], budget)]


def _next_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """In order, a new bin where the last one is full."""
    bins: list[list[int]] = [[]]
    room = budget
    for item, length in enumerate(lengths):
        if length > room and bins[-1]:
            bins.append([])
            room = budget
        bins[-1].append(item)
        room -= length
    return bins


def _fixed(lengths: list[int], budget: int) -> list[list[int]]:
    """As many pairs as surely fit, whatever their lengths: a fixed batch."""
    size = max(1, budget // max(lengths))
    return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]


FILLS: dict[str, Fill] = {
    "ours": _ours, "first fit": _first_fit, "first fit, decreasing": _first_fit_decreasing, "next fit": _next_fit,
    "fixed batch": _fixed,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="bins of a token budget beside the usual ways to fill them"))
    parser.add_argument("--data", help="a file of preferences, beside the distributions")
    parser.add_argument("--label", help="what the results call it; its path is never recorded")
    parser.add_argument("--pairs-per-step", type=int, default=128)
    given = parser.parse_args(words)
    at = replace(session(given), in_here=True)  # lists of integers: a process apiece would take longer
    steps, size = (2, 8) if given.dry_run else (8, given.pairs_per_step)
    named = {"tiny": "tiny"} if given.dry_run else {name: name for name in DISTRIBUTIONS if name != "tiny"}
    if given.data:
        named[given.label or "own data"] = given.data
    for label, data in named.items():
        lengths = [sum(row) for row in drawn_lengths(data, steps * size, at)]
        for budget in (256,) if given.dry_run else (2048, 8192):
            common = {"budget": budget, "steps": [lengths[i * size : (i + 1) * size] for i in range(steps)]}
            cases = [
                Case(
                    OURS if name == "ours" else name,
                    f"{size} pairs a step",
                    {**common, "fill": name},
                    f"{budget} tokens",
                )
                for name in FILLS
            ]
            better = {"share filled": 1, "fullest / mean": -1}
            run(Benchmark("bench_packing", {"data": label}, better), cases, at, name="packing")


if __name__ == "__main__":
    main()
