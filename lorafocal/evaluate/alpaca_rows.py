"""What AlpacaEval compares: pairs of answers to the same prompts, and the judgments that exist of them.

A row is AlpacaEval's: `output_1` is the reference's answer, `output_2` the model's, `preference` goes from 1 (the
reference's is better) to 2 (the model's is), 1.5 is a draw, None a prompt that nobody judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lorafocal.data.messages import read_text
from lorafocal.data.places import Place
from lorafocal.data.readers import objects, read_rows
from lorafocal.errors import InputError
from lorafocal.evaluate.result import prompt_sha256
from lorafocal.generation.formats import AnswerRow, Answers
from lorafocal.publish import text_sha256

Order = Literal["own", "another", "not these prompts"]

PROMPTS = 805
# `prompts_digest` of AlpacaEval's instructions in their own order, and sorted.
IN_ORDER = "aa9c5e8827beac4f66e2409ea1c423891c806d0aac949ce73b9979fe47c532e2"
IN_ANY_ORDER = "e5cca5cc338a703bf7954b9e0127206c6a25de2f6ce2ca6d54ebd27f1101ebca"
_TEXTS = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
RAW, _OLDER_RAW = "preference_raw_completion", "raw_completion"  # the judge's reply, whose names changed
_MISSING = -1  # what the package stores for a verdict that it could not read
_DRAW = 0  # how older files spell 1.5


def prompts_digest(hashes: Iterable[str]) -> str:
    """One sha256 of the prompts' own, in the order given."""
    return text_sha256("".join(hashes))


def order_of(instructions: Sequence[str]) -> Order:
    """Whether these are AlpacaEval's 805 prompts: in AlpacaEval's own order, in another one, or not at all."""
    hashes = [prompt_sha256(instruction) for instruction in instructions]
    if prompts_digest(hashes) == IN_ORDER:
        return "own"
    return "another" if prompts_digest(sorted(hashes)) == IN_ANY_ORDER else "not these prompts"


def pair_up(answers: Answers, reference: Answers) -> dict[int, dict[str, Any]]:
    """Rows without a preference by the prompt's position in `reference`, in its order.

    Raises InputError where a prompt is answered twice in a file, where no prompt is in both, and where both files name
    one model: the package takes that for a model compared with itself.
    """
    if answers.generator == reference.generator:
        raise InputError(
            f"{answers.file} and {reference.file} both name their model {answers.generator!r}, which AlpacaEval takes"
            " for a model compared with itself: generate with another --name"
        )
    own, theirs = by_instruction(answers), by_instruction(reference)
    rows = {
        position: {
            "instruction": instruction,
            "output_1": row.output,
            "generator_1": row.generator,
            **({} if row.dataset is None else {"dataset": row.dataset}),
            "output_2": own[instruction].output,
            "generator_2": own[instruction].generator,
        }
        for position, (instruction, row) in enumerate(theirs.items())
        if instruction in own
    }
    if not rows:
        raise InputError(
            f"{answers.file} and {reference.file} have no prompt in common: the reference's answers are to the same"
            " instructions, letter by letter"
        )
    return rows


def by_instruction(answers: Answers) -> dict[str, AnswerRow]:
    """Answers by their prompt, in order. Raises InputError for a prompt that is answered twice, or not named."""
    found: dict[str, AnswerRow] = {}
    for number, row in enumerate(answers.rows, start=1):
        place = Place(answers.file, number, "instruction")
        if row.instruction is None:
            raise place.fault("no_instruction", "missing; AlpacaEval's form is a JSON list with instruction and output")
        if row.instruction in found:
            raise place.fault("twice", "this prompt has an answer in an earlier row; keep one")
        found[row.instruction] = row
    return found


def place_rows(rows: Sequence[Mapping[str, Any]], order: Sequence[str], file: str) -> dict[int, dict[str, Any]]:
    """Annotations by their prompt's position in `order`. Raises InputError for a prompt that is not in it."""
    positions = {instruction: position for position, instruction in enumerate(order)}
    placed = {}
    for number, row in enumerate(rows, start=1):
        if row["instruction"] not in positions:
            raise Place(file, number, "instruction").fault("unknown", "the reference has no such prompt; give the one")
        placed[positions[row["instruction"]]] = dict(row)
    return dict(sorted(placed.items()))


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of annotations, of one model against one reference by one annotator, each prompt once.

    Every row keeps the texts, `preference` (draws as 1.5, missing ones as None) and, where the file has it,
    `preference_raw_completion`, the judge's own reply. Raises InputError naming file, row and key.
    """
    rows = [_read_row(values, place) for place, values in objects(read_rows(path), path.name, "an annotation")]
    if not rows:
        raise InputError(f"{path}: it holds no annotations")
    for key in ("generator_1", "generator_2", "annotator"):
        if len(names := sorted({row[key] for row in rows})) > 1:
            raise InputError(f"{path}: {key} names {', '.join(names[:3])}: give one file a model, reference and judge")
    if rows[0]["generator_1"] == rows[0]["generator_2"]:
        raise InputError(f"{path}: generator_1 and generator_2 are one model, {rows[0]['generator_1']!r}")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if row["instruction"] in seen:
            raise Place(path.name, number, "instruction").fault("twice", "an earlier row judges this prompt; keep one")
        seen.add(row["instruction"])
    return rows


def _read_row(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key in _TEXTS:
        if key not in values:
            raise place.at(key).fault("missing_key", f"missing; an annotation has {', '.join(_TEXTS)} and preference")
        row[key] = read_text(values[key], place.at(key))
    if "preference" not in values:
        raise place.at("preference").fault("missing_key", "missing; it is a number from 1 to 2, or null")
    row["preference"] = _preference(values["preference"], place.at("preference"))
    row[RAW] = next((values[key] for key in (RAW, _OLDER_RAW) if values.get(key) is not None), None)
    return row


def _preference(value: Any, place: Place) -> float | None:
    if value is None or value == _MISSING or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == _DRAW or 1 <= value <= 2):
        raise place.fault("no_preference", f"a preference is from 1 (the reference) to 2 (the model), not {value!r}")
    return 1.5 if value == _DRAW else float(value)
