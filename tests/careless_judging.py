"""What a careless author would have written where Arena-Hard's verdicts are read: a number comes out all the same."""

from __future__ import annotations

import re
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
