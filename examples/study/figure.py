"""The study's picture: every arm at every learning rate, differences to DPO with intervals, and how far margins got."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from analysis import Contrast, values
from design import Study
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from table import QUANTILES, Row

from lorafocal.publish import write_atomically
from lorafocal.report.plots import DPI, LIGHT

STYLES = ("-", "--", ":")


def draw(
    study: Study,
    runs: Sequence[Row],
    base: Row,
    chosen: dict[str, dict[str, float]],
    contrasts: Sequence[Contrast],
    file: Path,
) -> None:
    """Write `study.png`: a panel a condition, then differences to DPO, then margins in the primary condition."""
    count = len(study.conditions)
    figure = Figure(figsize=(6.4 * count, 10.5), dpi=DPI, facecolor=LIGHT.back, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, count)
    above = [figure.add_subplot(grid[0, place]) for place in range(count)]
    for axes, condition in zip(above, study.conditions, strict=True):
        _rates(axes, study, runs, base, condition.name)
    above[0].legend(fontsize=7, ncols=2, frameon=False)
    _differences(figure.add_subplot(grid[1, 0]), study, contrasts)
    _margins(figure.add_subplot(grid[1, count - 1]), study, runs, chosen[study.primary])
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(file, content.getvalue())


def _rates(axes: Axes, study: Study, runs: Sequence[Row], base: Row, condition: str) -> None:
    """Right answers on test questions over the learning rate: means over seeds, bars of one standard error."""
    for number, arm in enumerate(study.arms):
        found = [100 * np.asarray(values(runs, "test_right", condition, arm.name, rate)) for rate in study.rates]
        means, errors = zip(*((of.mean(), of.std(ddof=1) / len(of) ** 0.5) for of in found), strict=True)
        rates = [rate * arm.rate_factor * 1.012 ** (number - len(study.arms) / 2) for rate in study.rates]
        colour, style = LIGHT.runs[number % len(LIGHT.runs)], STYLES[number // len(LIGHT.runs)]
        axes.errorbar(rates, means, errors, color=colour, linestyle=style, linewidth=1.2, marker=".", label=arm.name)
    axes.axhline(100 * base["test_right"], color=LIGHT.soft, linewidth=0.8)
    axes.annotate("base", (study.rates[0], 100 * base["test_right"]), fontsize=7, color=LIGHT.soft, va="bottom")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="right answers, %", title=condition)
    axes.set_xticks(study.rates, [f"{rate:g}" for rate in study.rates])
    axes.minorticks_off()
    axes.grid(color=LIGHT.grid, linewidth=0.5)


def _differences(axes: Axes, study: Study, contrasts: Sequence[Contrast]) -> None:
    """Every contrast at each arm's own best rate: Student's interval over seeds, and the bootstrap's beside it."""
    names = list(dict.fromkeys((found.arm, found.against) for found in contrasts))
    for number, condition in enumerate(study.conditions):
        of = [found for found in contrasts if found.condition == condition.name]
        for found in of:
            height = -names.index((found.arm, found.against)) - 0.25 * number
            colour = LIGHT.runs[number]
            axes.plot((found.low, found.high), (height, height), color=colour, linewidth=1.4)
            axes.plot(found.drawn, (height, height), color=colour, linewidth=4, alpha=0.3)
            axes.plot(found.value, height, "o", color=colour, markersize=4)
        axes.plot([], [], "o", color=LIGHT.runs[number], label=condition.name)
    axes.axvspan(-study.equivalence, study.equivalence, color=LIGHT.grid, alpha=0.5, linewidth=0)
    axes.axvline(0, color=LIGHT.soft, linewidth=0.8)
    axes.set_yticks([-place for place in range(len(names))], [f"{arm} - {other}" for arm, other in names], fontsize=8)
    axes.set(xlabel="difference in points of right answers", title="each arm at its own best rate; 95% intervals")
    axes.legend(fontsize=8, frameon=False)


def _margins(axes: Axes, study: Study, runs: Sequence[Row], rates: dict[str, float]) -> None:
    """Log-ratio margins of training pairs after training, as labelled: middle 90%, middle 50% and median."""
    for number, arm in enumerate(study.arms):
        for offset, kind, colour in ((0.16, "clean", LIGHT.runs[0]), (-0.16, "swapped", LIGHT.runs[1])):
            keys = [f"{kind}_margin_{q}" for q in QUANTILES]
            of = [values(runs, key, study.primary, arm.name, rates[arm.name]) for key in keys]
            if not of[0]:
                continue
            q5, q25, q50, q75, q95 = (float(np.mean(found)) for found in of)
            height = -number + offset
            axes.plot((q5, q95), (height, height), color=colour, linewidth=1)
            axes.plot((q25, q75), (height, height), color=colour, linewidth=4, alpha=0.6)
            axes.plot(q50, height, "|", color=LIGHT.text)
            if number == 0:
                axes.plot([], [], color=colour, linewidth=3, label=f"{kind} pairs")
    axes.axvline(0, color=LIGHT.soft, linewidth=0.8)
    axes.set_yticks([-place for place in range(len(study.arms))], [arm.name for arm in study.arms], fontsize=8)
    axes.set(xlabel="log-ratio margin of training pairs as labelled, nats", title=f"after training, {study.primary}")
    axes.legend(fontsize=8, frameon=False)
