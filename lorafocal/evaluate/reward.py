"""What a reward model thinks of answers, alone and against another model's answers to the same prompts."""

from __future__ import annotations

from pathlib import Path

from lorafocal.evaluate.result import Result


def evaluate_reward(
    answers: Path,
    *,
    model: str,
    against: Path | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = 16384,
) -> Result:
    """Score an answers file by a sequence classifier with one output; `against`: win rate over another file's."""
    raise NotImplementedError
