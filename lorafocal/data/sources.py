"""Rows of files to `Preference`: a mistake in the data is found here, and named by file, row and key.

A file extension is one function in `READERS`; a form of row is one function in `FORMS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
from pyarrow import parquet

from lorafocal.errors import InputError

Messages = list[dict[str, str]]
NumberedRow = tuple[int, Any]
OnBadRow = Literal["error", "drop"]

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Preference:
    """One judged pair: three strings, or three lists of messages `{"role": ..., "content": ...}`.

    A conversational completion is one assistant message. Scores are a judge's, where the data has them.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    id: str
    score_chosen: float | None = None
    score_rejected: float | None = None
    place: str = ""  # where it was read: "pairs.jsonl, row 3"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: where (key included), a short name of the fault, and what is wrong with the way out."""

    place: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Preferences:
    """What was read: pairs in the order of the rows, the rows left out, and the names of the forms recognised."""

    pairs: list[Preference]
    bad_rows: list[BadRow]
    form: str


class RowFault(InputError):
    """One row that cannot be read; refused as it is, or kept as the `BadRow` it carries."""

    def __init__(self, bad_row: BadRow) -> None:
        super().__init__(str(bad_row))
        self.bad_row = bad_row


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands, for messages: `pairs.jsonl, row 3, key chosen`."""

    source: str
    row: int
    key: str = ""

    def at(self, key: str) -> Place:
        return Place(self.source, self.row, f"{self.key}{key}")

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}" + (f", key `{self.key}`" if self.key else "")

    def error(self, problem: str, reason: str = "unreadable_row") -> RowFault:
        return RowFault(BadRow(str(self), reason, problem))


def read_preferences(
    path: Path,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
) -> Preferences:
    """Preferences of a `.jsonl`, `.json` (one list) or `.parquet` file.

    Rows count from 1; in JSONL a row is a line, and blank lines are skipped. An id is the row's own `id` or
    `"<file name>:<row>"`. `columns` maps our key to the file's. A row that cannot be read is an InputError naming
    file, row and key, or is left out and kept in `bad_rows` under `on_bad_row="drop"`.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path.name}: preference files end in {', '.join(READERS)}; convert the file or rename it")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    return collect(reader(path), path.name, form, columns or {}, on_bad_row)


def preferences_from_rows(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
) -> Preferences:
    """Preferences of a `datasets.Dataset` or other mappings; `source` stands for the file's name."""
    return collect(enumerate(rows, start=1), source, form, columns or {}, on_bad_row)


def collect(
    rows: Iterable[NumberedRow], source: str, form: str | None, columns: Mapping[str, str], on_bad_row: OnBadRow
) -> Preferences:
    """All rows as preferences; refuses none at all and the same id twice."""
    if form not in (None, "explicit"):
        raise InputError(f"{source}: the form {form!r} is not known; use explicit")
    pairs: list[Preference] = []
    bad_rows: list[BadRow] = []
    row_of_id: dict[str, int] = {}
    for number, row in rows:
        place = Place(source, number)
        try:
            preference = read_row(renamed(row, columns), place)
            earlier = row_of_id.setdefault(preference.id, number)
            if earlier != number:
                raise place.at("id").error(f"{preference.id!r} is already the id of row {earlier}; ids must differ")
        except RowFault as fault:
            if on_bad_row == "error":
                raise
            bad_rows.append(fault.bad_row)
        else:
            pairs.append(preference)
    if not pairs:
        why = f"no row can be read, such as {bad_rows[0]}" if bad_rows else "it holds no rows"
        raise InputError(f"{source}: {why}; give at least one preference")
    return Preferences(pairs, bad_rows, "explicit")


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with our keys in place of its own."""
    if not columns or not isinstance(row, Mapping):
        return row
    return {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


# ---- files


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """One JSON object a line, split at line feeds only: JSON strings may hold other separators."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, decode_json(line, f"{path.name}, row {number}")


def read_json(path: Path) -> Iterator[NumberedRow]:
    """One JSON list of objects."""
    rows = decode_json(path.read_bytes(), path.name) if path.stat().st_size else []
    if not isinstance(rows, list):
        raise InputError(f"{path.name}: a .json file holds one list of rows, not {kind(rows)}; use .jsonl for lines")
    yield from enumerate(rows, start=1)


def decode_json(text: bytes, where: str) -> Any:
    """The JSON value of UTF-8 bytes (a byte order mark is skipped)."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}); repair or remove it"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: the JSON is nested too deeply to be a row; repair or remove it") from error


def read_parquet(path: Path) -> Iterator[NumberedRow]:
    """Rows of a Parquet file, batch by batch."""
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path.name}: not a readable Parquet file after row {number}; write it again") from error


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}


# ---- forms of a row


def read_explicit(row: Mapping[str, Any], place: Place) -> tuple[str | Messages, str | Messages, str | Messages]:
    """TRL's preference form with an explicit prompt: three strings or three lists of messages."""
    kinds = {key: kind(row[key]) for key in ("prompt", "chosen", "rejected")}
    for key, found in kinds.items():
        if found not in ("a string", "a list"):
            raise place.at(key).error(f"expected a string or a list of messages, found {found}")
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{key} is {what}" for key, what in kinds.items())
        raise place.error(f"strings and message lists are mixed ({found}); give all three in the same form")
    if kinds["prompt"] == "a string":
        prompt, chosen, rejected = (read_text(row[key], place.at(key)) for key in kinds)
        return prompt, chosen, rejected
    return (
        read_prompt_messages(row["prompt"], place.at("prompt")),
        read_completion_messages(row["chosen"], place.at("chosen")),
        read_completion_messages(row["rejected"], place.at("rejected")),
    )


Form = Callable[[Mapping[str, Any], Place], tuple[str | Messages, str | Messages, str | Messages]]
FORMS: dict[tuple[str, ...], Form] = {("prompt", "chosen", "rejected"): read_explicit}  # the first whose keys are there


def read_row(row: Any, place: Place) -> Preference:
    """One row of any known form."""
    if not isinstance(row, Mapping):
        raise place.error(f"a row is an object with the keys prompt, chosen and rejected, not {kind(row)}")
    present = {key for key, value in row.items() if value is not None}
    form = next((form for keys, form in FORMS.items() if present.issuperset(keys)), None)
    if form is None:
        raise missing_key(present, place)
    prompt, chosen, rejected = form(row, place)
    scores = [read_score(row.get(key), place.at(key)) for key in ("score_chosen", "score_rejected")]
    return Preference(prompt, chosen, rejected, read_id(row.get("id"), place), *scores, place=str(place))


def missing_key(present: set[str], place: Place) -> RowFault:
    """What to say about a row of no known form."""
    found = f"the row has {', '.join(sorted(map(str, present))) or 'nothing'}"
    if {"chosen", "rejected"} <= present:
        return place.at("prompt").error(
            f"missing ({found}). Prompts repeated inside chosen and rejected are not read yet: add a "
            "`prompt` column with what both answers share, and leave only the answers in chosen and rejected"
        )
    missing = next(key for key in ("chosen", "rejected", "prompt") if key not in present)
    return place.at(missing).error(f"missing ({found}); a row needs prompt, chosen and rejected")


def read_prompt_messages(messages: Any, place: Place) -> Messages:
    """A conversation that waits for the assistant."""
    read = read_messages(messages, place)
    if read[-1]["role"] == "assistant":
        raise place.error("the last message is the assistant's; a prompt ends before the answer that was judged")
    if not read[-1]["content"]:
        raise place.at(f"[{len(read) - 1}].content").error("empty; a prompt needs text")
    return read


def read_completion_messages(messages: Any, place: Place) -> Messages:
    """Exactly one assistant message, with text."""
    read = read_messages(messages, place)
    if len(read) > 1:
        raise place.error(
            f"{len(read)} messages; an answer is one assistant message: move the earlier ones, which both "
            "answers share, into prompt"
        )
    if read[0]["role"] != "assistant":
        raise place.at("[0].role").error(f"{read[0]['role']!r}; the judged message is the assistant's")
    if not read[0]["content"]:
        raise place.at("[0].content").error("empty; remove the row or give the answer a text")
    return read


def read_messages(messages: list[Any], place: Place) -> Messages:
    """Messages with a known role and text; what else a message holds would be lost and is refused."""
    if not messages:
        raise place.error("an empty list; give at least one message")
    read = []
    for position, message in enumerate(messages):
        here = place.at(f"[{position}]")
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise here.error('a message is {"role": ..., "content": ...}, found ' + describe_message(message))
        extra = sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None)
        if extra:
            raise here.error(f"messages with {', '.join(extra)} are not read yet; keep only role and content")
        if message["role"] not in ROLES:
            raise here.at(".role").error(f"{message['role']!r} is no known role; use one of {', '.join(ROLES)}")
        content = message["content"]
        if not isinstance(content, str):
            raise here.at(".content").error(f"expected a string, found {kind(content)}")
        read.append({"role": message["role"], "content": valid_unicode(content, here.at(".content"))})
    return read


def read_text(text: str, place: Place) -> str:
    """A string that is not empty."""
    if not text:
        raise place.error("an empty string; remove the row or give it a text")
    return valid_unicode(text, place)


def valid_unicode(text: str, place: Place) -> str:
    """The text, if it is UTF-8: a JSON escape can spell half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise place.error(f"character {error.start + 1} is half of a surrogate pair; repair the text") from error
    return text


def read_score(score: Any, place: Place) -> float | None:
    """A finite number, or None where there is none."""
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise place.error(f"expected a finite number, found {score!r}; correct it or leave the key out")
    return float(score)


def read_id(row_id: Any, place: Place) -> str:
    """The row's own id as text, or its file and row."""
    if row_id is None:
        return f"{place.source}:{place.row}"
    if isinstance(row_id, bool) or not isinstance(row_id, int | str) or row_id == "":
        raise place.at("id").error(f"expected a text or a whole number, found {row_id!r}; correct it or leave it out")
    return str(row_id)


def describe_message(message: Any) -> str:
    """What was found in place of a message."""
    return f"the keys {', '.join(map(str, message))}" if isinstance(message, Mapping) and message else kind(message)


def kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    names = {str: "a string", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    if value is None:
        return "null"
    return "an object" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)
