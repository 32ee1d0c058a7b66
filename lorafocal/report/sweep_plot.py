"""Pictures of a sweep as PNG bytes: held-out metrics over the first axis, one line a value of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter

from lorafocal.report.plots import (
    LIGHT,
    PANEL_INCHES,
    Theme,
    draw_names,
    dress,
    new_figure,
    png_bytes,
    run_colours,
    shortened,
    write_words,
)
from lorafocal.report.sweep_results import (
    ACCURACY,
    DISPLACEMENT,
    LOSS,
    SEEDS,
    Choice,
    Setting,
    SweepRecord,
    axis_label,
    settings,
    value_text,
    values_text,
    written,
)

WIDE = 8  # largest over smallest value of an axis that is drawn in logarithms


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: a metric of the settings."""

    key: str
    title: str
    unit: str


_TITLES = {
    LOSS: Panel(LOSS, "Held-out loss", "nats"),
    ACCURACY: Panel(ACCURACY, "Held-out reward accuracy", "share of pairs"),
    DISPLACEMENT: Panel(DISPLACEMENT, "Chosen answers: policy minus reference", "nats a completion"),
}


def drawable(sweep: SweepRecord) -> list[Panel]:
    """The criterion, and beside it what is on one scale for all points and was measured."""
    keys = dict.fromkeys((sweep.criterion.key, ACCURACY, DISPLACEMENT))
    return [_TITLES[key] for key in keys if any(setting.measured(key) for setting in settings(sweep.points))]


def sweep_png(panels: Sequence[Panel], sweep: SweepRecord, choice: Choice | None, theme: Theme = LIGHT) -> bytes:
    """The panels side by side, with the names of the lines once, on top."""
    lines = lines_of(sweep)
    figure = new_figure((PANEL_INCHES[0] * len(panels), PANEL_INCHES[1] + 0.5 * (len(lines) > 1)), theme)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw(axes, panel, sweep, choice, theme)
    if len(lines) > 1:
        draw_names(figure, [*lines], 40, theme)
    return png_bytes(figure)


def first_axis(sweep: SweepRecord) -> str:
    """The key along which metrics are drawn: the first one given that is no seed, if there is one."""
    return next((key for key in sweep.axes if key not in SEEDS), next(iter(sweep.axes)))


def lines_of(sweep: SweepRecord) -> dict[str, list[tuple[Any, Setting]]]:
    """(value of the first axis, setting there) of each line, under the values of the other axes as text.

    Where seeds are all that varies, each point stands alone.
    """
    axis, lines = first_axis(sweep), dict[str, list[tuple[Any, Setting]]]()
    if axis in SEEDS:
        return {"": [(point.values[axis], Setting({}, (point,))) for point in sweep.points]}
    for setting in settings(sweep.points):
        name = values_text(setting.values, sweep.axes, leave_out=(axis,))
        lines.setdefault(name, []).append((setting.values[axis], setting))
    return lines


def is_logarithmic(key: str, values: Sequence[Any]) -> bool:
    """Whether an axis is drawn in logarithms: learning rates, and what spans a factor of 8."""
    if not values or not _are_numbers(values) or min(values) <= 0:
        return False
    return key.endswith("learning_rate") or max(values) / min(values) >= WIDE


def _draw(axes: Axes, panel: Panel, sweep: SweepRecord, choice: Choice | None, theme: Theme) -> None:
    dress(axes, theme)
    key, lines = first_axis(sweep), lines_of(sweep)
    values = _in_order([value for line in lines.values() for value, setting in line if setting.finished])
    places = _places(values)
    joined = key not in SEEDS and _are_numbers(values)
    for number, (line, colour) in enumerate(zip(lines.values(), run_colours(len(lines), theme), strict=True)):
        dots = [
            (places[written(value)], mean, setting.spread(panel.key) or 0.0)
            for value, setting in line
            if (mean := setting.mean(panel.key)) is not None
        ]
        if dots:
            x, y, spread = zip(*sorted(dots), strict=True)
            behind = 1 + (len(lines) - 1 - number) / len(lines)  # equal lines stay visible
            axes.errorbar(
                x, y, spread if any(spread) else None, linestyle="-" if joined else "none", linewidth=1.5 * behind,
                marker="o", markersize=5 * behind, capsize=3 * behind, elinewidth=1, color=colour,
            )  # fmt: skip
        for value, setting in line:
            if choice and panel.key == sweep.criterion.key and choice.point in setting.points:
                at, best = [places[written(value)]], [fmean(setting.measured(panel.key))]
                axes.plot(at, best, "o", markersize=12, markerfacecolor="none", color=theme.text)
    if is_logarithmic(key, values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places.values()), [shortened(value_text(value), 16) for value in values], parse_math=False)
    axes.margins(0.08, 0.12)
    write_words(axes.set_title("", fontsize=11, loc="left"), panel.title, theme)
    write_words(axes.set_xlabel(""), axis_label(key, sweep.axes), theme)
    axes.set_ylabel(panel.unit, color=theme.text)
    if panel.key == ACCURACY:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Each value once; numbers by size, words in the order of the sweep."""
    once = list({written(value): value for value in values}.values())
    return sorted(once) if _are_numbers(once) else once


def _places(values: Sequence[Any]) -> dict[str, float]:
    """Where each value stands on the axis: a number at itself, words side by side."""
    numbers = _are_numbers(values)
    return {written(value): float(value if numbers else place) for place, value in enumerate(values)}


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
