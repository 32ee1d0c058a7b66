"""Rows to `Preference`s: files (data/readers.py) and other rows, in the forms of data/forms.py."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lorafocal.data.columns import COLUMNS, FurtherAnswer, read_columns, read_score
from lorafocal.data.forms import FORMS, Form, Row, Side, form_named, read_sides, recognise, refuse_columns, with_system
from lorafocal.data.messages import Messages, kind, read_text
from lorafocal.data.places import BadRow, OnBadRow, Place, RowFault, leave_out, nothing_left, printable
from lorafocal.data.readers import NumberedRow, read_rows
from lorafocal.errors import InputError

# What data sets call a judge's scores; the first pair of keys is ours.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
# Lists of answers to a prompt, of which `data.steps` makes pairs (data/ranked.py), and of what is said of them.
LISTS = ("answers", "responses", "completions", "all_generated_responses")
OF_LISTS = ("answers", "scores", "ranking")
# Several answers of a model with a score each, two of which became the pair, as in llama3-ultrafeedback-armorm.
JUDGED = ("all_generated_responses", "all_rm_scores")
OPTIONAL_KEYS = ("id", *SCORES[0], "system", *COLUMNS)
FIRST_ROWS = 100  # where the columns that a config names must show up


@dataclass(frozen=True, slots=True)
class Preference:
    """One judged pair: three strings, or three lists of messages `{"role": ..., "content": ...}`.

    A conversational completion is one message of the assistant's, or several turns, of which the first and the last
    are the assistant's. Scores are a judge's, where the data has them. `others` are
    further answers, `embedding` is the prompt's, and `group` whatever pairs are told apart by (`data/columns.py`).
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    id: str
    score_chosen: float | None = None
    score_rejected: float | None = None
    place: str = ""  # where it was read: "pairs.jsonl, row 3"
    others: tuple[FurtherAnswer, ...] = ()
    group: str | None = None
    embedding: tuple[float, ...] | None = None

    @property
    def where(self) -> str:
        """Where it was read; a pair made by hand has an id only."""
        return self.place or self.id


@dataclass(frozen=True, slots=True)
class Preferences:
    """What was read: pairs in the order of the rows, the rows left out, and the names of the forms recognised."""

    pairs: list[Preference]
    bad_rows: list[BadRow]
    form: str


Pairing = Callable[[Row, bool], list[Preference]]


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read: the form that was stated (else each row's own), columns of other names, what ends it."""

    form: Form | None
    columns: Mapping[str, str]  # our key -> the source's
    on_bad_row: OnBadRow
    pairing: Pairing | None = None  # how a row of several answers becomes pairs, where it does

    @classmethod
    def of(
        cls,
        form: str | None,
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
        pairing: Pairing | None = None,
    ) -> Reading:
        """Raises InputError for a form, a key or a way with bad rows that is not known."""
        known = dict.fromkeys([*(key for known_form in FORMS.values() for key in known_form.keys), *OPTIONAL_KEYS])
        known |= dict.fromkeys(OF_LISTS)
        if pairing is not None and form not in (None, "single_turn"):
            raise InputError(f"form: {form!r} is none of rows that pairs are made of; leave it out, or say single_turn")
        for key in columns or {}:
            if key not in known:
                raise InputError(f"columns: {key!r} is no key of ours; {nearest(key, known)}")
        if on_bad_row not in ("error", "drop"):
            raise InputError(f"on_bad_row is {on_bad_row!r}; use error or drop")
        return cls(form_named(form) if form is not None else None, columns or {}, on_bad_row, pairing)


def read_preferences(
    path: Path,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    pairing: Pairing | None = None,
) -> Preferences:
    """Preferences of a .jsonl, .json (one list), .csv, .parquet or .arrow file; the first three may end in .gz too.

    Rows count from 1; in JSONL a row is a line, and blank lines are skipped; in CSV it is a record below the header.
    An id is the row's own `id` (in many data sets the prompt's: a second one becomes `"<id>~<row>"`), or
    `"<file name>:<row>"`. `form` names one of `FORMS`, by default each row's own is
    recognised; `columns` maps a key of the form to the file's column. A row that cannot be read is an InputError
    naming file, row and key, or is left out and kept in `bad_rows` under `on_bad_row="drop"`. A file that cannot be
    read, or gives no pair, is an InputError. `pairing` makes pairs of rows of several answers (data/ranked.py).
    """
    path = Path(path)
    return collect(read_rows(path), path.name, Reading.of(form, columns, on_bad_row, pairing))


def preferences_from_rows(
    rows: Iterable[Any],
    source: str,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    pairing: Pairing | None = None,
) -> Preferences:
    """Preferences of a `datasets.Dataset` or other mappings, such as pandas' records; `source` is the file's name."""
    return collect(enumerate(map(plain_row, rows), start=1), source, Reading.of(form, columns, on_bad_row, pairing))


def plain_row(row: Any) -> Any:
    """A row with Python's values for numpy's, and None for NaN, which is pandas' missing value."""
    if not isinstance(row, Mapping):
        return row
    plain = {key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for key, value in row.items()}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}


def collect(rows: Iterable[NumberedRow], source: str, reading: Reading) -> Preferences:
    """All rows as preferences, under ids that differ; refuses none at all."""
    rows = iter(rows)
    first = list(islice(rows, FIRST_ROWS))
    columns = dict.fromkeys(key for _, row in first if isinstance(row, Mapping) for key in row if isinstance(key, str))
    check_columns(columns, source, reading)
    pairs: list[Preference] = []
    bad_rows: list[BadRow] = []
    forms: Counter[str] = Counter()
    ids: set[str] = set()
    for number, values in chain(first, rows):
        place = Place(source, number)
        try:
            row = {**columns, **values} if isinstance(values, Mapping) else values  # a line may leave out its nulls
            found, form = read_row(row, place, reading)
        except RowFault as fault:
            leave_out(fault, bad_rows, reading.on_bad_row)
        else:
            for preference in found:
                if preference.id in ids:
                    preference = replace(preference, id=f"{preference.id}~{number}")
                ids.add(preference.id)
                pairs.append(preference)
            forms[form] += 1
    if not pairs:
        raise nothing_left(source, bad_rows)
    return Preferences(pairs, bad_rows, ", ".join(name for name, _ in forms.most_common()))


def check_columns(found: Mapping[str, None], source: str, reading: Reading) -> None:
    """The columns that were named are there, and some column is one of a form."""
    for ours, theirs in reading.columns.items():
        if found and theirs not in found:
            raise InputError(
                f"{source}: columns: {{{ours}: {theirs}}} names a column that none of the first {FIRST_ROWS} rows has; "
                f"{nearest(theirs, found)}"
            )
    known = {key for form in FORMS.values() for key in form.keys} | {*reading.columns.values(), *LISTS}
    if found and not found.keys() & known:
        raise InputError(
            f"{source}: no row has a key of a known form; found {', '.join(map(repr, islice(found, 8)))}. Say which is "
            "which with columns: {prompt: ..., chosen: ..., rejected: ...}; a CSV needs a header, with commas"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Which names are known, the nearest first; of many their number."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3)
    more = f" and {len(known) - 20:,} more" if len(known) > 20 else ""
    return printable((f"did you mean {' or '.join(near)}? " if near else "") + f"known: {', '.join(known[:20])}{more}")


# ---- one row


def read_row(values: Any, place: Place, reading: Reading) -> tuple[list[Preference], str]:
    """The pairs of one row, which are one but where pairs are made of its answers, and its form. Raises RowFault."""
    if isinstance(values, RowFault):
        raise values
    if not isinstance(values, Mapping):
        message = (
            f"a row is an object with keys such as prompt, chosen and rejected, not {kind(values)}; write it as one"
        )
        raise place.fault("no_object", message)
    row = Row(renamed(values, reading.columns), place)
    refuse_columns(row)
    if reading.columns.get("prompt") == "instruction" and row.values.get("input"):
        message = "half of what was asked would be lost; join instruction and input in a column, and name that"
        raise place.at("input").fault("lost_input", message)
    if reading.pairing is not None:
        return reading.pairing(row, reading.form is not None), "ranked"
    refuse_ranked(row, reading)
    form = reading.form or recognise(row)
    sides = with_system(read_sides(row, form), row)
    scores = read_scores(row) if named_scores(row) else judged_scores(row, *sides[1:])
    more = read_columns(row, sides)
    preference = Preference(*sides, read_id(row), *scores, str(place), more.others, more.group, more.embedding)
    return [preference], form.name


def refuse_ranked(row: Row, reading: Reading) -> None:
    """A row of several answers and no pair gives as many pairs as somebody says."""
    named = next((name for name in LISTS if isinstance(row.values.get(name), list)), None)
    if reading.form is None and named and row.values.get("chosen") is None and row.values.get("rejected") is None:
        raise row.place.at(named).fault(
            "several_answers",
            "several answers and no pair; say which pairs to make of them, by data.steps: [{pairs: {of: best_worst}}]",
        )


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with our keys in place of its own."""
    if not columns:
        return values
    others = {key: value for key, value in values.items() if key not in columns.values()}
    return others | {ours: values.get(theirs) for ours, theirs in columns.items()}


def named_scores(row: Row) -> tuple[str, str] | None:
    """The first pair of names of which one has a score."""
    return next((keys for keys in SCORES if any(row.values.get(key) is not None for key in keys)), None)


def read_scores(row: Row) -> tuple[float | None, float | None]:
    """A judge's scores of the two answers, under their own names."""
    chosen, rejected = (read_score(row.values.get(key), row.place.at(key)) for key in named_scores(row) or SCORES[0])
    return chosen, rejected


def judged_scores(row: Row, chosen: Side, rejected: Side) -> tuple[float | None, float | None]:
    """A judge's scores from a list of all answers and one of their scores; None for an answer that is not listed.

    An answer that stands there twice has its better score as chosen, its worse as rejected: that is why it was taken.
    """
    answers, scores = (row.values.get(key) for key in JUDGED)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        return None, None

    def found(side: Side) -> list[float]:
        if not isinstance(side, str) and len(side) > 1:
            return []  # the list is of answers of one turn
        text = (side if isinstance(side, str) else side[0]["content"]).strip()
        listed = zip(answers, scores, strict=True)
        those = (score for answer, score in listed if isinstance(answer, str) and answer.strip() == text)
        return [number for score in those if (number := read_score(score, row.place.at(JUDGED[1]))) is not None]

    return max(found(chosen), default=None), min(found(rejected), default=None)


def read_id(row: Row) -> str:
    """The row's own id as text, or its source and row."""
    row_id = row.values.get("id")
    if row_id is None:
        return f"{row.place.source}:{row.place.row}"
    if isinstance(row_id, bool) or not isinstance(row_id, int | str) or row_id == "":
        found = repr(row_id)[:40] if isinstance(row_id, str | float | bool) else kind(row_id)
        raise row.place.at("id").fault(
            "bad_id", f"expected a text or a whole number, found {found}; correct it or leave it out"
        )
    return read_text(str(row_id), row.place.at("id"))
