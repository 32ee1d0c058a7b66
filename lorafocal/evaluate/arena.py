"""Arena-Hard v0.1: the win rate against a baseline, from pairwise verdicts in both orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorafocal.evaluate.result import Result

if TYPE_CHECKING:
    from lorafocal.endpoints import Endpoint, Spending


def evaluate_arena(
    answers: Path | None = None,
    *,
    judgments: Path,
    questions: Path | None = None,
    baseline: Path | None = None,
    judge: Endpoint | None = None,
    judge_config: Path | None = None,
    price: tuple[float, float] | None = None,
    approve: Callable[[Spending], bool] | None = None,
    allow_missing: int = 0,
    rounds: int = 100,
    seed: int = 42,
    say: Callable[[str], None] = print,
) -> Result:
    """The win rate of the judgments in `judgments`; with a `judge` they are made first, and written there.

    Judging needs `answers`, `questions` and `baseline` (Arena-Hard's JSONL forms) and `approve`; its journal lies
    beside `judgments`, so the same call goes on where a killed one stopped. `judge_config` is that project's YAML
    (its judge prompt); without it the prompt is this project's own, which the result notes. `price` is USD a million
    tokens (in, out). Up to `allow_missing` games may stay without a reply. `rounds` and `seed` are the bootstrap's.
    """
    raise NotImplementedError
