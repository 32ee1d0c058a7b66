"""Pictures of runs as PNG bytes: a panel, an overview of all panels, and the margins of single pairs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from lorafocal.objectives import Objective
from lorafocal.objectives.factor import in_words
from lorafocal.objectives.pairwise import dpo_weight
from lorafocal.report.numbers import first_middle_last, own_weights, table_margins
from lorafocal.report.panels import Panel, drawable
from lorafocal.report.read import RunRecord

DPI = 140
PANEL_INCHES = (5.6, 3.3)
_IN_VIEW = 0.995  # share of the pairs that a histogram must show
_NARROWEST_VIEW = 0.05  # width of a histogram, in margin, of runs that hardly moved
_BINS = 48
_FEW_POINTS = 15


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a light or a dark page; runs take `runs` in order, on every picture alike."""

    back: str
    text: str
    soft: str
    grid: str
    runs: tuple[str, ...]


# Told apart with every common colour blindness (after Okabe and Ito), at least 3:1 against their background.
LIGHT = Theme(
    "#ffffff", "#1c2024", "#5b6470", "#d5dae0",
    ("#0072b2", "#d55e00", "#008a64", "#b0578f", "#8a6d00", "#3d8fc4", "#5b6470"),
)  # fmt: skip
DARK = Theme(
    "#1c2127", "#e6e9ed", "#9aa4b0", "#343b44",
    ("#56a8e8", "#ff8a4c", "#2fc795", "#e39ac7", "#e6c229", "#9ad7f5", "#b8c0ca"),
)  # fmt: skip


def run_colours(count: int, theme: Theme) -> list[str]:
    """One colour a run; beyond the palette they are spread over the rainbow."""
    if count <= len(theme.runs):
        return list(theme.runs[:count])
    spread = matplotlib.colormaps["turbo"]([0.08 + 0.84 * number / (count - 1) for number in range(count)])
    return [matplotlib.colors.to_hex(colour) for colour in spread]


def panel_png(panel: Panel, records: Sequence[RunRecord], theme: Theme) -> bytes:
    """One panel; which colour is which run is said beside it."""
    figure = new_figure(PANEL_INCHES, theme)
    _draw_panel(figure.subplots(), panel, records, theme)
    return png_bytes(figure)


def overview_png(records: Sequence[RunRecord], theme: Theme = LIGHT) -> bytes:
    """All panels on one picture, with the names of the runs once, on top."""
    panels = drawable(records)
    rows = math.ceil(len(panels) / 2)
    figure = new_figure((2 * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.5), theme)
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel, records, theme)
    for axes in places[len(panels) :]:
        axes.remove()
    draw_names(figure, [record.name for record in records], 28 if len(records) > 1 else 72, theme)
    return png_bytes(figure)


def margins_png(record: RunRecord, colour: str, theme: Theme) -> bytes | None:
    """Margins of the held-out pairs at the first, middle and last evaluation, under the gradient weights.

    None where the run left no table of pairs, or its beta is unknown.
    """
    if not record.tables or record.beta is None:
        return None
    tables = first_middle_last(record.tables)
    margins = {table.step: table_margins(table, record.beta) for table in tables}
    low, high = _view(torch.cat(list(margins.values())), record.turning_point)
    figure = new_figure((PANEL_INCHES[0], 1.9 + 1.25 * len(tables)), theme)
    top, *below = figure.subplots(
        1 + len(tables), 1, sharex=True, squeeze=False, height_ratios=[1.5] + [1.0] * len(tables)
    ).flat
    _draw_weights(top, own_weights(record), low, high, theme)
    for axes, (step, values) in zip(below, margins.items(), strict=True):
        _draw_histogram(axes, step, values, low, high, colour, theme)
    for axes in (top, *below):
        axes.axvline(0, color=theme.soft, linewidth=0.8)
        if low < record.turning_point < high:
            label = f"turns at {record.turning_point:.1f}"
            axes.axvline(record.turning_point, color=theme.soft, linewidth=1.2, linestyle=":", label=label)
    draw_key(top, theme)
    below[-1].set_xlabel("margin of a pair", color=theme.text)
    below[-1].set_xlim(low, high)
    title = f"Margins of held-out pairs: {shortened(record.name, 32)}"
    write_words(top.set_title("", fontsize=11, loc="left"), title, theme)
    return png_bytes(figure)


def _draw_weights(axes: Axes, own: Objective | None, low: float, high: float, theme: Theme) -> None:
    """The objective's and DPO's weight of a pair in the gradient, over its margin."""
    dress(axes, theme)
    margin = torch.linspace(low, high, 400, dtype=torch.float64)
    axes.plot(margin, dpo_weight(margin), "--", color=theme.soft, linewidth=1.6, label="DPO")
    if own is not None:
        weight = own.weights(margin)
        shape = {key: value for key, value in own.as_dict().items() if key != "beta"}  # which the margin has in it
        axes.plot(margin, weight, color=theme.text, linewidth=1.8, label=in_words(shape))
        axes.set_ylim(min(-0.03, float(weight.min()) - 0.03), 1.05)
    else:
        axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("weight", color=theme.text)


def _draw_histogram(
    axes: Axes, step: int, margins: torch.Tensor, low: float, high: float, colour: str, theme: Theme
) -> None:
    """Share of pairs a bin, on its own scale: at the start all pairs may lie in one."""
    dress(axes, theme)
    inside = margins[(margins >= low) & (margins <= high)]
    counts, edges = torch.histogram(inside, bins=_BINS, range=(low, high))
    shares = counts / len(margins)
    axes.stairs(shares.tolist(), edges.tolist(), fill=True, color=colour, alpha=0.85)
    outside = len(margins) - len(inside)
    words = [
        f"after step {step}",
        f"mean {float(margins.mean()):+.3g}",
        f"{float((margins > 0).double().mean()):.0%} above 0",
    ]
    if outside:
        words.append(f"{outside} of {len(margins)} out of view")
    axes.set_title(" · ".join(words), fontsize=8, loc="left", color=theme.text, pad=3)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylim(0, 1.08 * max(float(shares.max()), 1e-3))
    axes.set_ylabel("pairs", color=theme.text)


def _view(margins: torch.Tensor, turn: float) -> tuple[float, float]:
    """Bounds that show nearly all pairs and margin 0, and the turning point where a pair is past it."""
    tail = (1 - _IN_VIEW) / 2
    low, high = torch.quantile(margins, torch.tensor([tail, 1 - tail], dtype=margins.dtype)).tolist()
    low, high = min(low, -_NARROWEST_VIEW / 2), max(high, _NARROWEST_VIEW / 2)
    if float(margins.min()) < turn:
        low = min(low, 1.2 * turn)
    room = 0.06 * (high - low)
    return low - room, high + room


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[RunRecord], theme: Theme) -> None:
    dress(axes, theme)
    colours = run_colours(len(records), theme)
    keys: dict[str, Line2D] = {}
    for curve in panel.curves:
        for number, (record, colour) in enumerate(zip(records, colours, strict=True)):
            series = curve.values(record)
            if not series.steps:
                continue
            behind = (len(records) - 1 - number) / max(len(records) - 1, 1)
            style = _style(curve.kind, len(series.steps), 1 + behind)  # equal curves stay visible
            axes.plot(*series, color=colour, **style)
            keys[curve.key] = Line2D([], [], color=theme.soft, **_style(curve.kind, _FEW_POINTS, 1))
    axes.set_title(panel.title, fontsize=11, loc="left", color=theme.text)
    axes.set_xlabel("optimiser step", color=theme.text)
    axes.set_ylabel(panel.unit, color=theme.text)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    end = max(1.0, *(line["step"] for record in records for line in record.lines))
    axes.set_xlim(-0.03 * end, 1.03 * end)  # the same steps stand under one another on every panel
    if panel.zero:
        axes.axhline(0, color=theme.soft, linewidth=0.8, zorder=0)
    if panel.percent:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(keys) > 1:
        draw_key(axes, theme, list(keys.values()), list(keys))


def _style(kind: str, points: int, scale: float) -> dict[str, Any]:
    """How a curve of so many points is drawn, `scale` times as thick as the thinnest."""
    marks = {"marker": "o", "markersize": 3.5 * scale} if points < _FEW_POINTS else {}
    held_out = {"linestyle": ":", "linewidth": 1.0, "marker": "o", "markersize": 4.5 * scale}
    return {
        "line": {"linestyle": "-", "linewidth": 1.5 * scale, **marks},
        "dashed": {"linestyle": "--", "linewidth": 1.5 * scale, **marks},
        "dots": held_out,
        "rings": {**held_out, "markerfacecolor": "none"},
        "diamonds": {"linestyle": "-.", "linewidth": 1.0, "marker": "D", "markersize": 5 * scale},
    }[kind]


def new_figure(inches: tuple[float, float], theme: Theme) -> Figure:
    figure = Figure(figsize=inches, layout="constrained", facecolor=theme.back)
    FigureCanvasAgg(figure)  # no window system, no global state
    return figure


def dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.back)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.soft, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))


def draw_key(axes: Axes, theme: Theme, *entries: Any) -> None:
    """What the kinds of line mean, on a ground of its own where curves pass behind."""
    axes.legend(*entries, fontsize=8, labelcolor=theme.text, facecolor=theme.back, edgecolor="none", framealpha=0.8)


def draw_names(figure: Figure, names: Sequence[str], limit: int, theme: Theme) -> None:
    """What the colours are of, on top of all panels; of each name at most `limit` characters."""
    swatches = [Line2D([], [], color=colour, linewidth=4) for colour in run_colours(len(names), theme)]
    legend = figure.legend(
        swatches, [str(n) for n in range(len(names))], loc="outside upper center", ncols=min(len(names), 4),
        frameon=False,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        write_words(text, shortened(name, limit), theme)


def shortened(name: str, limit: int) -> str:
    """The name with its middle left out where it is longer than `limit` characters."""
    half = (limit - 3) // 2
    return name if len(name) <= limit else f"{name[:half]} … {name[-half:]}"


def write_words(text: matplotlib.text.Text, words: str, theme: Theme) -> None:
    """A user's own words are never read as mathematics, nor as a legend's entry to hide."""
    text.set_parse_math(False)
    text.set_text(words)
    text.set_color(theme.text)


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
