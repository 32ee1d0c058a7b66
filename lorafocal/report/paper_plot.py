"""A table of the paper as a picture: a panel a column, a line a model, with the intervals of a user's own numbers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lorafocal.report.paper import Cell, Row, Table, mark_of
from lorafocal.report.plots import Theme, dress, new_figure, png_bytes, shortened, write_words

LINE_INCHES, PANEL_INCHES, NAMES_INCHES = 0.27, 2.9, 2.6
_MARKERS = {"paper": "o", "publisher": "x", "yours": "D"}
_WORDS = {"paper": "the paper", "publisher": "the checkpoint's publisher", "yours": "yours"}


def table_png(table: Table, legend: Sequence[str], theme: Theme) -> bytes:
    """Columns of which nothing is known are left out; letters are those of `legend`, as below the table."""
    panels = _panels(table)
    lines = [(title, row) for title, rows in table.blocks for row in rows]
    inches = (NAMES_INCHES + PANEL_INCHES * len(panels), 1.3 + LINE_INCHES * len(lines))
    figure = new_figure(inches, theme)
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, cells) in zip(drawn, panels, strict=True):
        dress(axes, theme)
        _draw(axes, lines, cells, legend, theme)
        write_words(axes.set_title(" ", fontsize=10, loc="left"), f"{name}, %", theme)
    _name_lines(drawn[0], lines, theme)
    shown = [whose for whose in _MARKERS if any(row.whose == whose for _, row in lines)]
    keys = [
        Line2D([], [], color=_colour(whose, theme), marker=_MARKERS[whose], linestyle="none", label=_WORDS[whose])
        for whose in shown
    ]
    figure.legend(
        handles=keys, loc="outside upper right", ncols=len(keys), frameon=False, labelcolor=theme.text, fontsize=9
    )
    return png_bytes(figure)


def _panels(table: Table) -> list[tuple[str, list[Cell | None]]]:
    """Name and cells, one a row, of each column that has a number."""
    columns: list[tuple[str, list[Cell | None]]] = [
        (column.name, [row.cells[number] for row in table.rows]) for number, column in enumerate(table.columns)
    ]
    columns.append(("Mean of the six", [row.mean for row in table.rows]))
    return [(name, cells) for name, cells in columns if any(cell is not None and cell.score for cell in cells)]


def _draw(
    axes: Axes, lines: Sequence[tuple[str, Row]], cells: Sequence[Cell | None], legend: Sequence[str], theme: Theme
) -> None:
    for place, ((_, row), cell) in enumerate(zip(lines, cells, strict=True)):
        if cell is None or cell.score is None:
            continue
        colour, score = _colour(row.whose, theme), cell.score
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [place, place], color=colour, linewidth=1.6)
        filling = theme.back if cell.reasons else colour  # hollow where it does not compare
        marker = _MARKERS[row.whose]
        axes.plot([score.value], [place], marker=marker, color=colour, markerfacecolor=filling, linestyle="none")
        words = f"{score.value:.1f}{mark_of(cell.reasons, legend)}"
        axes.annotate(
            words, (score.value, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7,
            color=theme.soft,
        )  # fmt: skip
    axes.margins(x=0.15)


def _name_lines(axes: Axes, lines: Sequence[tuple[str, Row]], theme: Theme) -> None:
    names = [f"{shortened(row.name, 34)}, {title.partition(' (')[0].partition(',')[0]}" for title, row in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.4, -0.7)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        write_words(label, name, theme)


def _colour(whose: str, theme: Theme) -> str:
    return {"paper": theme.runs[0], "publisher": theme.soft, "yours": theme.runs[1]}[whose]
