"""Answers that runs write to the test questions, beside the probabilities that the study compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cell import Place
from design import Cell, Pairs, Study
from task import held_out_rows, write_rows

from lorafocal.evaluate.by_rule import evaluate_rule
from lorafocal.generation import generate

TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
NEW_TOKENS = 8  # the longest right answer has five digits and an end
SEED = 0  # of drawing: all runs draw with the same random numbers

Verdicts = Mapping[str, list[bool]]  # by the names of `TEMPERATURES`, in the order of the questions


def answer(cell: Cell, place: Place, pairs: Pairs) -> Verdicts:
    """Which of a run's answers the rule calls right; what has been written is not written again."""
    questions = place.out / "answers" / "questions.jsonl"
    if not questions.exists():
        write_rows(questions, held_out_rows(pairs.validation + pairs.test)[pairs.validation :])
    return {how: _right(cell, place, questions, how) for how in TEMPERATURES}


def _right(cell: Cell, place: Place, questions: Path, how: str) -> list[bool]:
    file = place.out / "answers" / f"{cell.name}-{how}.json"
    generate(
        place.out / "runs" / cell.name,
        questions,
        out=file,
        name=cell.name,
        temperature=TEMPERATURES[how],
        max_new_tokens=NEW_TOKENS,
        seed=SEED,
        say=lambda line: None,
    )
    return [item["right"] for item in evaluate_rule(file, rule="exact", targets=questions, field="chosen").items]


def compared_cells(study: Study, rates: Mapping[str, float]) -> list[Cell]:
    """The runs of the primary contrast, each arm at its rate in the primary condition."""
    condition = study.condition(study.primary)
    return [Cell(condition, study.arm(arm), rates[arm], seed) for seed in condition.seeds for arm in study.contrast]


def answer_rows(study: Study, cells: Sequence[Cell], verdicts: Sequence[Verdicts]) -> list[dict[str, Any]]:
    """A row a run: its shares of right answers, and its wins over the other arm's of the same seed, ties half."""
    rows = []
    against = {cell.seed: of for cell, of in zip(cells, verdicts, strict=True) if cell.arm.name == study.contrast[1]}
    for cell, of in zip(cells, verdicts, strict=True):
        row: dict[str, Any] = {"condition": cell.condition.name, "arm": cell.arm.name, "seed": cell.seed}
        for how in TEMPERATURES:
            ours, theirs = (np.asarray(side[how], dtype=float) for side in (of, against[cell.seed]))
            row |= {f"{how}_right": ours.mean(), f"{how}_wins": (ours - theirs).mean() / 2 + 0.5}
        rows.append(row)
    return rows
