"""The study's pairs: digits to sort, to reverse, or to find the maximum of, where a rule knows the right answer.

Training pairs are a right answer and a slip; in a noisy condition a known share of them is swapped. Held-out pairs are
never swapped, and their questions are never trained on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lorafocal.data.toy import toy_preferences
from lorafocal.publish import write_atomically

CHOSEN_SCORE, REJECTED_SCORE = 5.0, 1.0  # alike for all pairs: Omni-DPO reads scores, the others do not
HELD_OUT_SEED = 0

Row = dict[str, Any]


def training_rows(count: int, *, noise: float, seed: int) -> list[Row]:
    """`count` pairs, of which each is swapped with probability `noise`; `swapped` says which.

    The same seed gives the same questions and slips whatever the noise.
    """
    rng = random.Random(f"swaps {seed}")
    return [_row(row, swapped=rng.random() < noise) for row in toy_preferences(count, seed=seed)]


def held_out_rows(count: int) -> list[Row]:
    """`count` pairs with questions of the held-out tenth, none swapped: the same for all runs."""
    return [_row(row, swapped=False) for row in toy_preferences(count, seed=HELD_OUT_SEED, held_out=True)]


def _row(row: Row, *, swapped: bool) -> Row:
    chosen, rejected = (row["rejected"], row["chosen"]) if swapped else (row["chosen"], row["rejected"])
    scores = {"score_chosen": CHOSEN_SCORE, "score_rejected": REJECTED_SCORE}
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **scores, "swapped": swapped}


def kind_of(row: Row) -> str:
    """A row's difficulty: operation and number of digits, as `sort 5`."""
    operation, *digits = row["prompt"][-1]["content"].split()
    return f"{operation} {len(digits)}"


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line, without the mark of a swap: no run may know it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: value for key, value in row.items() if key != "swapped"}) + "\n" for row in rows)
    write_atomically(path, "".join(lines))
