"""The paper's Table 1 and Table 2, and a user's results in their columns, each cell with what keeps it from comparing.

The data are those of `configs/paper/results.yaml`; a value that nobody could read there stays unread here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, Literal

from lorafocal import recipes
from lorafocal.evaluate.result import Result, Score
from lorafocal.report.comparable import Standard, family_of, reasons, standard_of
from lorafocal.yaml12 import parse_yaml

NOT_READ, NOT_MEASURED = "not read", "not measured"
Whose = Literal["paper", "publisher", "yours"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the paper: which score of which benchmark a result has for it."""

    name: str
    benchmark: str
    score: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as it is printed, or the words that stand for it; `reasons` say why it does not compare."""

    text: str
    score: Score | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One model: a line of the paper, one that its checkpoint's publisher prints, or a user's own."""

    name: str
    whose: Whose
    source: str
    cells: tuple[Cell, ...]
    mean: Cell | None = None  # of all columns, where the table has an average
    printed: Cell | None = None  # the paper's own average, and how far it is off


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the paper; `blocks` are its rows by base, a user's rows on another base the last of them.

    `averaged` tables have an average of their columns.
    """

    number: int
    title: str
    columns: tuple[Column, ...]
    averaged: bool
    blocks: tuple[tuple[str, tuple[Row, ...]], ...]
    oddities: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for _, rows in self.blocks for row in rows)


@dataclass(frozen=True, slots=True)
class PaperTables:
    """Both tables, what the results say of themselves, and the results that belong in neither table."""

    paper: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    others: tuple[Result, ...]

    @property
    def legend(self) -> tuple[str, ...]:
        """Every reason once, in the order of the cells: the first is marked a, the second b."""
        cells = (cell for table in self.tables for row in table.rows for cell in all_cells(row))
        return tuple(dict.fromkeys(reason for cell in cells for reason in cell.reasons))


def paper_tables(results: Sequence[Result]) -> PaperTables:
    """The paper's tables with `results` in them: a row a model, and another one where a benchmark came twice.

    Results of benchmarks that the paper does not print come back as `others`.
    """
    data = paper_data()
    standard = standard_of(data)
    used = [result for result in results if result.benchmark in data["benchmarks"]]
    rows = _by_row(used)
    tables = tuple(
        _table(number, name, spec, rows, standard)
        for number, (name, spec) in enumerate(data["tables"].items(), start=1)
    )
    notes = tuple(f"{result.model}, {result.benchmark}: {note}" for result in results for note in result.notes)
    return PaperTables(data["paper"], tables, notes, tuple(result for result in results if result not in used))


@cache
def paper_data() -> dict[str, Any]:
    """`configs/paper/results.yaml`, which comes with the package."""
    path = recipes.folder() / f"{recipes.RESULTS}.yaml"
    data: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), source=path.name)
    return data


@cache
def _marks() -> Mapping[str, recipes.Mark]:
    return recipes.marks([recipes.folder() / f"{recipes.RESULTS}.yaml"])


def _source(key: str) -> str:
    """`paper, Table 1`, or whose README a line of the data is from."""
    mark = _marks()[key]
    return f"paper, {mark.source}" if mark.kind == "paper" else mark.source


def all_cells(row: Row) -> Iterator[Cell]:
    """The cells of a row from left to right, its averages among them."""
    yield from row.cells
    yield from (cell for cell in (row.mean, row.printed) if cell is not None)


def mark_of(reasons: Sequence[str], legend: Sequence[str]) -> str:
    """The letters of a cell's reasons, ` (a, c)`; nothing where there are none."""
    return f" ({', '.join(letter(legend.index(reason)) for reason in reasons)})" if reasons else ""


def letter(number: int) -> str:
    """a to z, then aa, ab and so on, from 0."""
    above, own = divmod(number, 26)
    return (letter(above - 1) if above else "") + chr(ord("a") + own)


def _by_row(results: Sequence[Result]) -> list[tuple[str, dict[str, Result]]]:
    """Results of one model share a row; other weights of that name, or the same benchmark again, begin another."""
    rows: list[tuple[str, dict[str, Result]]] = []
    for result in results:
        free = (held for name, held in rows if name == result.model and _fits(result, held))
        held = next(free, None)
        if held is None:
            rows.append((result.model, held := {}))
        held[result.benchmark] = result
    return rows


def _fits(result: Result, held: Mapping[str, Result]) -> bool:
    weights = {_weights(each) for each in (result, *held.values())} - {None}
    return result.benchmark not in held and len(weights) <= 1


def _weights(result: Result) -> str | None:
    """The digest of what answered, where the result knows it."""
    target = result.target or {}
    model = target.get("model")
    found = target.get("adapter_sha256") or (model.get("sha256") if isinstance(model, Mapping) else None)
    return found if isinstance(found, str) else None


def _table(
    number: int, key: str, spec: Mapping[str, Any], rows: Sequence[tuple[str, dict[str, Result]]], standard: Standard
) -> Table:
    columns = tuple(Column(**column) for column in spec["columns"])
    benchmarks, averaged = {column.benchmark for column in columns}, spec.get("averaged", False)
    blocks: dict[str | None, list[Row]] = {
        family: [
            *(_paper_row(name, row, f"tables.{key}.rows.{family}.{name}") for name, row in lines.items()),
            *(
                _published_row(name, values, f"tables.{key}.published.{family}.{name}")
                for name, values in spec.get("published", {}).get(family, {}).items()
            ),
        ]
        for family, lines in spec["rows"].items()
    }
    for name, held in rows:
        if benchmarks & held.keys():
            family = family_of(held.values(), standard)
            blocks.setdefault(family, []).append(_own_row(name, held, columns, averaged, family, standard))
    titles = {family: entry["name"] for family, entry in standard.families.items()}
    named = tuple(
        (titles.get(family or "", "Another base, or none stated"), tuple(lines)) for family, lines in blocks.items()
    )
    return Table(number, spec["title"], columns, averaged, named, tuple(spec["oddities"]))


def _paper_row(name: str, row: Mapping[str, Any], key: str) -> Row:
    """A line of the paper: `mean` is what its columns average to, `excess` what its printed average is above that."""
    cells = tuple(map(_printed_cell, row["values"]))
    if "mean" not in row:
        return Row(name, "paper", _source(key), cells)
    printed = _printed_cell(row.get("printed"))
    average = Cell(f"{printed.text} ({row['excess']:+.2f})", printed.score)
    return Row(name, "paper", _source(key), cells, _printed_cell(row["mean"]), average)


def _published_row(name: str, values: Sequence[float | None], key: str) -> Row:
    return Row(name, "publisher", _source(key), tuple(map(_printed_cell, values)))


def _printed_cell(value: float | None) -> Cell:
    return Cell(NOT_READ) if value is None else Cell(f"{value:.1f}", Score(value))


def _own_row(
    name: str,
    held: Mapping[str, Result],
    columns: Sequence[Column],
    averaged: bool,
    family: str | None,
    standard: Standard,
) -> Row:
    cells = tuple(_own_cell(held.get(column.benchmark), column, family, standard) for column in columns)
    return Row(name, "yours", "yours", cells, _own_mean(cells) if averaged else None)


def _own_cell(result: Result | None, column: Column, family: str | None, standard: Standard) -> Cell:
    if result is None:
        return Cell(NOT_MEASURED)
    score = result.scores.get(column.score)
    if score is None:
        return Cell(NOT_MEASURED, None, ("the result has no such score",))
    return Cell(str(score), score, reasons(result, family, standard))


def _own_mean(cells: Sequence[Cell]) -> Cell:
    """Only of all columns: a mean of some is another number."""
    scores = [cell.score.value for cell in cells if cell.score is not None]
    if len(scores) < len(cells):
        return Cell(NOT_MEASURED, None, (f"{len(scores)} of the {len(cells)} columns are there: no average",))
    marks = dict.fromkeys(reason for cell in cells for reason in cell.reasons)
    return Cell(f"{fmean(scores):.2f}", Score(fmean(scores)), tuple(marks))
