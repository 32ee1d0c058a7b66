"""`lorafocal report --paper`: the paper's tables with a user's rows as Markdown, CSV, one web page, and pictures."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lorafocal.evaluate.result import read_result, results_among
from lorafocal.publish import check_ours
from lorafocal.report import html
from lorafocal.report.paper import Cell, PaperTables, Row, Table, all_cells, letter, mark_of, paper_tables
from lorafocal.report.paper_plot import table_png
from lorafocal.report.plots import DARK, LIGHT

PAGE_FILE, TEXT_FILE, CSV_FILE = "paper.html", "paper.md", "paper.csv"
_OURS = re.compile(r"paper\.(html|md|csv)|table-\d+\.png")
ABOUT = (
    'Rows of the paper are as printed there; "not read" is a value that could not be read in it. Rows from a README are'
    " what the publisher of the checkpoint behind the paper's row prints for it. Letters behind a number of yours say"
    " why it does not compare with the paper's; without one it is made as theirs is, as far as that is known. Percent,"
    " with 95% intervals where there are any."
)


@dataclass(frozen=True, slots=True)
class PaperReport:
    """The tables, and the files they were written to."""

    tables: PaperTables
    files: tuple[Path, ...]

    def table(self) -> str:
        """The Markdown, and where the files are."""
        return "\n".join([markdown(self.tables), *(f"written  {file}" for file in self.files)])

    def as_dict(self) -> dict[str, Any]:
        """The cells for a program, and the files."""
        return {"cells": list(records(self.tables)), "notes": list(self.tables.notes), "files": [*map(str, self.files)]}


def write_paper(results: Sequence[Path], out: Path) -> PaperReport:
    """Put result files beside the paper's tables, in the folder `out`: Markdown, CSV, HTML and a PNG a table.

    What an evaluation kept beside a result is passed over where both are given. An earlier report of this kind is
    replaced once the new one is whole. Raises InputError for files that are no results, and for an `out` that holds
    anything else; then nothing is written.
    """
    tables = paper_tables([read_result(path) for path in results_among([Path(path) for path in results])])
    target = Path(out)
    check_ours(target, _OURS, "a report beside the paper")
    pictures = {f"table-{table.number}.png": table_png(table, tables.legend, LIGHT) for table in tables.tables}
    dark = {f"table-{table.number}.png": table_png(table, tables.legend, DARK) for table in tables.tables}
    files: dict[str, bytes] = {
        TEXT_FILE: markdown(tables).encode("utf-8", "replace"),
        CSV_FILE: csv_text(tables).encode("utf-8", "replace"),
        PAGE_FILE: page(tables, [(pictures[name], dark[name]) for name in pictures]).encode("utf-8", "replace"),
        **pictures,
    }
    html.write_folder(target, files)
    return PaperReport(tables, tuple(target / name for name in files))


def head(table: Table) -> list[str]:
    """The names over the columns of a table."""
    averages = ["Mean of the six", "Average in the paper (above the mean)"] if table.averaged else []
    return ["model", "from", *(column.name for column in table.columns), *averages]


def texts(row: Row, table: Table, legend: Sequence[str]) -> list[str]:
    """A row's cells as they are shown, as many as the table has columns."""
    shown = [cell.text + mark_of(cell.reasons, legend) for cell in all_cells(row)]
    return shown + ["–"] * (len(head(table)) - 2 - len(shown))


def markdown(tables: PaperTables) -> str:
    """Both tables, the letters' meanings, oddities of the paper, and what the results say of themselves."""
    lines = [f"# Beside the paper: {tables.paper}", "", ABOUT]
    for table in tables.tables:
        names = head(table)
        for title, rows in table.blocks:
            lines += ["", f"## Table {table.number}, {table.title}: {title}", ""]
            lines += [_line(names), _line(["---"] * len(names))]
            lines += [_line([row.name, row.source, *texts(row, table, tables.legend)]) for row in rows]
    for title, points in _lists(tables):
        lines += ["", f"## {title}", "", *(f"- {_plain(point)}" for point in points)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """One line in which no bar ends a cell and nothing opens an element."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _lists(tables: PaperTables) -> Iterator[tuple[str, list[str]]]:
    """What stands below the tables, a title and its points each; nothing that is empty."""
    parts = [
        ("Why a number does not compare", [f"{letter(n)}: {reason}" for n, reason in enumerate(tables.legend)]),
        ("What the results say of themselves", list(tables.notes)),
        *((f"Oddities of the paper's Table {table.number}", list(table.oddities)) for table in tables.tables),
        ("Results the paper has no column for", [*_others(tables)]),
    ]
    return ((title, points) for title, points in parts if points)


def _others(tables: PaperTables) -> Iterator[str]:
    for result in tables.others:
        numbers = ", ".join(f"{name} {score}" for name, score in result.scores.items())
        yield f"{result.model}, {result.benchmark}: {numbers}"


def records(tables: PaperTables) -> Iterator[dict[str, Any]]:
    """One mapping a cell, with its value and interval as numbers."""
    for table in tables.tables:
        names = head(table)[2:]
        for title, rows in table.blocks:
            for row in rows:
                for name, cell in zip(names, all_cells(row), strict=False):
                    yield {
                        "table": table.number,
                        "base": title,
                        "model": row.name,
                        "whose": row.whose,
                        "source": row.source,
                        "column": name,
                        "shown": cell.text,
                        **_numbers(cell),
                        "not_comparable": "; ".join(cell.reasons),
                    }


def _numbers(cell: Cell) -> dict[str, float | None]:
    return {name: getattr(cell.score, name, None) for name in ("value", "low", "high", "standard_error")}


def csv_text(tables: PaperTables) -> str:
    """The same cells, a line each: for a spreadsheet or a data frame."""
    buffer = io.StringIO()
    rows = list(records(tables))
    writer = csv.DictWriter(buffer, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def page(tables: PaperTables, pictures: Sequence[tuple[bytes, bytes]]) -> str:
    """The whole page; `pictures` are a table's PNG for light and for dark pages each."""
    body = [f"<h1>{escape(f'Beside the paper: {tables.paper}')}</h1>", html.paragraph(ABOUT)]
    for table, (light, dark) in zip(tables.tables, pictures, strict=True):
        blocks = (
            html.table(
                head(table),
                [[row.name, row.source, *texts(row, table, tables.legend)] for row in rows],
                caption=title,
            )
            for title, rows in table.blocks
        )
        drawn = html.picture(light, dark, description=f"Table {table.number} as a picture")
        body.append(html.section(f"Table {table.number}: {table.title}", *blocks, drawn))
    body += [html.section(title, html.items(points)) for title, points in _lists(tables)]
    return html.document("Beside the paper", "\n".join(body), style=_STYLE)


_STYLE = """
.scroll { margin: 0 0 1.4rem; } th, td { white-space: nowrap; }
td:nth-child(2), th:nth-child(2) { text-align: left; color: var(--soft); }
"""
