"""Training pairs that a list of the user's leaves out: `data.leave_out`, a file of ids, one a line.

Behind an id and a tab may stand the digest of the pair's texts, as `lorafocal suspects` writes it. An id that was made
of file and row names another pair once a row above it is gone: with the digest that is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lorafocal.data.hygiene import key
from lorafocal.data.places import BadRow, printable
from lorafocal.data.sources import Preference, nearest
from lorafocal.data.steps.flip import swapped
from lorafocal.errors import InputError

REASON = "in_leave_out"
_DIGITS = 16  # of the digest, hexadecimal
_SHOWN = 120  # characters of a line in a message: any file may be given for a list


class Named(NamedTuple):
    """One line of a list."""

    line: int
    id: str
    digest: str | None


def line_of(pair: Preference) -> str:
    """The line of a list that names `pair`. Raises InputError for an id that no line can hold."""
    if not pair.id.strip() or set(pair.id) & set("\n\r\t"):
        raise InputError(
            f"{pair.where}: its id {printable(pair.id)!r} cannot stand in a line of a list; give the rows ids without"
            " tabs and line feeds"
        )
    return f"{pair.id}\t{digest(pair)}"


def digest(pair: Preference) -> str:
    """Of what the pair says and which answer was chosen; blanks around texts make no difference."""
    said = json.dumps([key(pair.prompt), key(pair.chosen), key(pair.rejected)])
    return hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]


def read_list(path: Path) -> list[Named]:
    """The lines of a list but blank ones. Raises InputError where it cannot be read, or names nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.leave_out: {path} cannot be read ({getattr(error, 'strerror', None) or error}); it is a text of"
            " ids, one a line"
        ) from error
    named = []
    for number, line in enumerate(lines, start=1):
        name, tab, stamp = line.rstrip("\r").partition("\t")
        if name.strip():
            named.append(Named(number, name, stamp.strip() if tab else None))
    if not named:
        raise InputError(f"data.leave_out: {path} names no pair; write ids into it, one a line, or remove the key")
    return named


def named_pairs(
    path: Path, train: Sequence[Preference], held_out: Iterable[Preference], *, flips: bool = False
) -> list[Preference]:
    """The training pairs that the list names, in the order of the data.

    Where the run `flips` pairs, a list may have been made of what it was trained on, with the answers exchanged.

    Raises InputError naming the line for an id that no training pair has or whose texts are others now, and where no
    pair would be left.
    """
    pairs = {pair.id: pair for pair in train}
    kept_back = {pair.id for pair in held_out} - pairs.keys()
    ids = {_checked(named, path, pairs, kept_back, flips) for named in read_list(path)}
    if len(ids) == len(pairs):
        raise InputError(f"data.leave_out: {path} names all {len(pairs)} training pairs; leave some to train on")
    return [pair for pair in train if pair.id in ids]


def bad_row(pair: Preference, path: Path) -> BadRow:
    """A pair that the list names, among the rows left out."""
    return BadRow(pair.where, REASON, f"{path.name} names them (data.leave_out)")


def _checked(named: Named, path: Path, pairs: Mapping[str, Preference], kept_back: Collection[str], flips: bool) -> str:
    """The id of the one pair that a line names."""
    shown = named.id if len(named.id) <= _SHOWN else f"{named.id[:_SHOWN]}..."
    place = f"data.leave_out: {path}, line {named.line}: {printable(shown)!r}"
    pair = pairs.get(named.id)
    if pair is None and named.id in kept_back:
        raise InputError(f"{place} is a held-out pair, which nothing is trained on; remove the line")
    if pair is None:
        raise InputError(
            f"{place} names no training pair (a row that is left out for another reason is none); remove the line, or"
            f" correct it: {nearest(shown, pairs)}"
        )
    if named.digest not in (None, digest(pair), *([digest(swapped(pair))] if flips else [])):
        raise InputError(
            f"{place} is another pair now than when the list was written (it is {pair.where}): the rows have changed"
            " since. Make the list again, or give the rows ids of their own"
        )
    return pair.id
