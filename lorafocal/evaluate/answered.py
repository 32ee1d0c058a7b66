"""What was answered during training, and how that was judged: a file a step, in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_file, evaluation_files
from lorafocal.publish import write_atomically

FOLDER = "answers"


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt's answer, whether the judge found it good (None: it could not say), and whether it was cut.

    A cut answer reached the limit of new tokens before its end.
    """

    id: str
    answer: str
    good: bool | None
    cut: bool


def write_answered(run: Path, step: int, how: Mapping[str, Any], rows: Sequence[Answered]) -> None:
    """Into the run folder, complete or absent: first how answers were made and judged, then an answer a line."""
    path = evaluation_file(run, step, FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [how, *map(asdict, rows)]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_answered(path: Path) -> tuple[dict[str, Any], list[Answered]]:
    """What `write_answered` wrote: how, and the answers. Raises InputError naming the file."""
    try:
        how, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rows = [Answered(**{field.name: line[field.name] for field in fields(Answered)}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold the answers of a step ({type(error).__name__}: {error}): remove it"
        ) from error
    return how, rows


def first_verdicts(run: Path, how: Mapping[str, Any], ids: Sequence[str]) -> list[bool | None] | None:
    """The earliest verdicts on answers to the same prompts, made and judged in the same way; None where there are
    none."""
    for path in evaluation_files(run, FOLDER).values():
        found, rows = read_answered(path)
        if found == dict(how) and [row.id for row in rows] == list(ids):
            return [row.good for row in rows]
    return None
