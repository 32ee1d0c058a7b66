"""What pairs are selected and ordered by: one number a pair, from its row or from a file of scores.

| name | of a pair | from |
|---|---|---|
| score_gap | score_chosen - score_rejected, the external margin | the row |
| length_gap | length of chosen - rejected in characters, or in tokens of the file | the row, or the file |
| margin | chosen - rejected reward, the implicit margin beta * (log-ratio difference), nats | the file |
| reference_gap | log-prob of chosen - rejected under the reference, nats | the file |
| ches, ches_normalised | likeness of the hidden states of both answers (evaluate/ches.py) | the file |

The file is what `lorafocal score --out` writes: an object a line, joined by `id`. Its `digest` tells whether the pair
is still the one that was scored; where the answers have been exchanged since, what changes its sign with them does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.bounds import is_number
from lorafocal.data.forms import Side
from lorafocal.data.leave_out import digest as stamp_of
from lorafocal.data.messages import said_in
from lorafocal.data.places import printable
from lorafocal.data.readers import objects, read_rows
from lorafocal.data.sources import Preference
from lorafocal.data.steps.flip import swapped
from lorafocal.errors import InputError

Scores = Mapping[str, Mapping[str, Any]]  # id -> the object of its line

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "margin": ("margin",),
    "reference_gap": ("reference_chosen_logps", "reference_rejected_logps"),
    "ches": ("ches",),
    "ches_normalised": ("ches_normalised",),
    "length_gap": ("chosen_tokens", "rejected_tokens"),
}
"""Columns of the file: one number, or two whose difference it is."""
TURNS = ("margin", "reference_gap", "length_gap")  # the sign changes where chosen and rejected are exchanged
_ASK = {
    "margin": "score with a reference and a beta (`--reference`, `--beta`), or give the adapter of a run",
    "reference_gap": "score with a reference (`--reference`), or give the adapter of a run",
    "ches": "score with `--ches`",
    "ches_normalised": "score with `--ches`",
    "length_gap": "give what `lorafocal score --out` wrote",
}


def values_of(pairs: Sequence[Preference], name: str, scores: Path | None, where: str) -> list[float]:
    """The number `name` of each pair, in the order of `pairs`.

    Raises InputError, naming the first pair, for numbers that rows or file lack, for a pair that the file does not
    know, and for one whose texts are others than those that were scored.
    """
    if name == "score_gap":
        return [_score_gap(pair, where) for pair in pairs]
    if scores is None:
        return [float(_characters(pair.chosen) - _characters(pair.rejected)) for pair in pairs]
    found = read_scores(scores, where)
    if missing := [pair for pair in pairs if pair.id not in found]:
        raise InputError(
            f"{where}.scores: {scores} has no scores of {len(missing)} of {len(pairs)} pairs, the first"
            f" {printable(missing[0].id)!r} ({missing[0].where}); score the training pairs as they are now,"
            " or say unscored: leave_out (scoring leaves out pairs over the length limit, as training does)"
        )
    read = _reader(name, scores, where)
    return [read(pair, found[pair.id]) for pair in pairs]


def read_scores(path: Path, where: str) -> Scores:
    """The lines of a file of scores by id. Raises InputError where it cannot be read or scores an id twice."""
    try:
        rows = [values for _, values in objects(read_rows(path), path.name, "a score")]
    except InputError as error:
        raise InputError(f"{where}.scores: {error}") from error
    found: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("id")
        if not isinstance(name, str) or (name in found and dict(found[name]) != dict(row)):
            why = "has no text `id`" if not isinstance(name, str) else f"scores {printable(name)!r} a second time"
            raise InputError(f"{where}.scores: {path}, row {number} {why}; give what `lorafocal score --out` wrote")
        found[name] = row
    return found


def _reader(name: str, path: Path, where: str) -> Callable[[Preference, Mapping[str, Any]], float]:
    columns = COLUMNS[name]

    def read(pair: Preference, row: Mapping[str, Any]) -> float:
        numbers: list[float] = []
        for column in columns:
            number = row.get(column)
            if not is_number(number):
                raise InputError(
                    f"{where}.scores: {path} gives {number!r} for {column} of {printable(pair.id)!r}, and {name} is"
                    f" made of it; {_ASK[name]}"
                )
            numbers.append(float(number))
        value = numbers[0] if len(numbers) == 1 else numbers[0] - numbers[1]
        stamp = row.get("digest")
        if stamp in (None, stamp_of(pair)):
            return value
        if stamp == stamp_of(swapped(pair)) and name in TURNS:
            return -value
        how = "with its answers exchanged" if stamp == stamp_of(swapped(pair)) else "with other texts"
        raise InputError(
            f"{where}.scores: {path} scored {printable(pair.id)!r} {how} ({pair.where}); score the training"
            " pairs as they are now"
        )

    return read


def _score_gap(pair: Preference, where: str) -> float:
    if pair.score_chosen is None or pair.score_rejected is None:
        lacking = "score_rejected" if pair.score_rejected is None else "score_chosen"
        raise InputError(
            f"{where}: score_gap needs both scores of every pair, and {pair.where} has no {lacking}; give every row"
            " both (columns: names them where they are called otherwise)"
        )
    return pair.score_chosen - pair.score_rejected


def _characters(side: Side) -> int:
    return sum(map(len, said_in(side)))
