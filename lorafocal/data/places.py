"""Where a row stands, and what is wrong with it: every fault of the data is named by source, row and key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorafocal.errors import InputError

OnBadRow = Literal["error", "drop"]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: where (key included), a short name of the fault, what is wrong and the way out."""

    place: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class RowFault(InputError):
    """One row that cannot be used: it ends the run, or is kept as the `BadRow` it carries."""

    def __init__(self, place: object, reason: str, message: str) -> None:
        self.bad_row = BadRow(printable(str(place)), reason, printable(message))
        super().__init__(str(self.bad_row))


def printable(text: str) -> str:
    """The text of a message, without what a terminal or UTF-8 would stumble over: names of keys come from the data."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Place(NamedTuple):
    """A value's place, for messages: pairs.jsonl, row 3, key `chosen[0].content`."""

    source: str
    row: int
    key: str = ""

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}" + (f", key `{self.key}`" if self.key else "")

    def at(self, key: str) -> Place:
        """The place of a part."""
        return Place(self.source, self.row, f"{self.key}{key}")

    def fault(self, reason: str, message: str) -> RowFault:
        return RowFault(self, reason, message)


def leave_out(fault: RowFault, bad_rows: list[BadRow], on_bad_row: OnBadRow) -> None:
    """Under `error` the fault ends everything, under `drop` it is counted."""
    if on_bad_row == "error":
        raise fault
    bad_rows.append(fault.bad_row)


def nothing_left(source: str, bad_rows: Sequence[BadRow]) -> InputError:
    """Why a source gives no pair: the commonest reasons, each with its first row."""
    if not bad_rows:
        return InputError(f"{source}: it holds no rows; give at least one preference")
    first = {bad_row.reason: bad_row for bad_row in reversed(bad_rows)}
    counts = Counter(bad_row.reason for bad_row in bad_rows)
    reasons = "; ".join(f"{count} {reason}, such as {first[reason]}" for reason, count in counts.most_common(5))
    return InputError(f"{source}: none of its {len(bad_rows)} rows can be used: {reasons}")
