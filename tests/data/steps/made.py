"""Pairs made by hand, for the steps of `data.steps`."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.data.leave_out import digest
from lorafocal.data.sources import Preference


def made(count: int = 20) -> list[Preference]:
    """Pairs with ids, and score gaps that differ: a multiple of 7 in a prime's ring."""
    return [
        Preference(
            f"question {n}", f"good {n}", f"bad {n}" * (1 + n % 3), f"id-{n}", float(7 * n % 23), 0.0, f"f, row {n}"
        )
        for n in range(count)
    ]


def shuffled(pairs: Sequence[Preference], seed: int = 0) -> list[Preference]:
    mixed = list(pairs)
    random.Random(seed).shuffle(mixed)
    return mixed


def ids(pairs: Sequence[Preference]) -> list[str]:
    return [pair.id for pair in pairs]


def write_scores(
    path: Path, pairs: Sequence[Preference], *, stamped: bool = True, **changes: Mapping[str, Any]
) -> Path:
    """A line a pair as `lorafocal score` writes them, the margin being a tenth of the row; `changes` by column."""
    rows = [
        {
            "id": pair.id,
            "chosen_tokens": 3 + n,
            "rejected_tokens": 5,
            "reference_chosen_logps": -4.0 - n,
            "reference_rejected_logps": -9.0,
            "margin": n / 10,
            "ches": -float(n),
        }
        | ({"digest": digest(pair)} if stamped else {})
        | {column: values[pair.id] for column, values in changes.items() if pair.id in values}
        for n, pair in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
