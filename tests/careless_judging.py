"""What a careless author would have written where answers are judged: a number comes out all the same.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def last_label(text: str, pattern: re.Pattern[str]) -> tuple[str | None, bool]:
    """Row 58: of labels that differ, one is taken."""
    labels = pattern.findall(text)
    return (labels[-1] if labels else None), not labels


def missing_is_a_tie(self: Any) -> list[float]:
    """Row 58: a game without a verdict counts as a draw."""
    from lorafocal.evaluate.arena_verdicts import LABELS

    games = zip(self.labels, self.wins, strict=True)
    return [0.5 if win is None else win for label, win in games for _ in range(LABELS.get(label, (0.5, 1))[1])]


def always_second(self: Any) -> tuple[float | None, float | None]:
    """Row 58: the model is taken for assistant B in both games."""
    from lorafocal.evaluate.arena_verdicts import LABELS

    first, second = (1.0 - LABELS[label][0] if label in LABELS else None for label in self.labels)
    return first, second


def in_their_order(result: Any, path: Any, order: Any) -> dict[Any, Any]:
    """Row 58: the first verdict is the first prompt's, whatever the result says."""
    from lorafocal.report.answers import _verdict

    return dict(zip(order, map(_verdict, result.items), strict=False))


@contextmanager
def padding_of_the_tokenizer(model: Any, rows: Any) -> Iterator[int]:
    """Row 58: padded with the end of a text, as is common, so that a reward is read from the token before it."""
    config = model.config.get_text_config()
    config.pad_token_id = config.eos_token_id
    yield config.pad_token_id
    config.pad_token_id = None


@contextmanager
def lengths_of_the_model(model: Any) -> Iterator[None]:
    """Row 58: a limit in a model's own generation config cuts the answers of every task."""
    yield
