"""What a careless author would have written where answers during training are compared with the first ones."""

from __future__ import annotations

from typing import Any


def verdicts_of_the_first_file(run: Any, how: Any, ids: Any) -> list[bool | None] | None:
    """Row 16: the first evaluation is what others are compared with, however its answers were made and judged."""
    from lorafocal.evaluate.answered import FOLDER, read_answered
    from lorafocal.evaluations import evaluation_files

    first = next(iter(evaluation_files(run, FOLDER).values()), None)
    return None if first is None else [row.good for row in read_answered(first)[1]]
