"""Pictures of the results, from the CSV files alone: `python benchmarks/draw.py [--results DIR] [--to DIR]`.

One picture a file and unit that is worth one: bars of the newest measurement of each case, whiskers of its spread.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
OURS = "lorafocal"
PICTURES = {  # file: units that are drawn
    "step": ("pairs/s", "peak GiB"),
    "logps": ("tokens/s", "extra GiB"),
    "lora": ("tokens/s, a layer", "saved KiB a token and layer"),
    "attention": ("pairs/s, forward and backward",),
    "packing": ("share filled",),
    "quantized": ("pairs/s", "peak GiB"),
}
Row = dict[str, str]


def newest(rows: Iterable[Row], unit: str) -> dict[str, list[Row]]:
    """Rows of `unit` by what they are of (device, model, dtype, data, threads), of each those of the last commit."""
    found: dict[str, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        if row["unit"] == unit:
            title = ", ".join(filter(None, (row[name] for name in ("device", "model", "dtype", "data"))))
            title += f", threads {row['threads']}"
            cases = found.setdefault(title, {})
            if cases and next(iter(cases.values()))["commit"] != row["commit"]:
                cases.clear()  # other commits are not put beside each other
            cases[row["implementation"], row["settings"], row["batch"]] = row
    return {title: list(cases.values()) for title, cases in found.items()}


def draw(title: str, unit: str, rows: Sequence[Row], file: Path) -> None:
    """Horizontal bars, ours in another colour."""
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.4 * len(rows)), layout="constrained")
    names = [f"{row['implementation']}: {row['settings']}" for row in rows]
    values = [float(row["median"]) for row in rows]
    colours = ["tab:blue" if row["implementation"] == OURS else "tab:gray" for row in rows]
    spread = [float(row["spread"]) / 2 for row in rows]
    places = range(len(rows))
    bars = axes.barh(places, values, xerr=spread, color=colours)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{title} ({rows[-1]['commit']})", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="pictures of the results")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--to", type=Path, default=HERE / "results", help="folder of the pictures")
    given = parser.parse_args(words)
    given.to.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "lorafocal"  # equal results, equal files
    for name, units in PICTURES.items():
        file = given.results / f"{name}.csv"
        if not file.exists():
            continue
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        for unit in units:
            for title, cases in newest(rows, unit).items():
                words_ = [word for word in f"{name} {unit} {title}".lower().split() if word]
                plain = "".join(c if c.isalnum() else "-" for c in "-".join(words_))
                draw(title, unit, cases, given.to / f"{'-'.join(filter(None, plain.split('-')))}.svg")


if __name__ == "__main__":
    main()
