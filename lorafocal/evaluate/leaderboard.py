"""Tasks of EleutherAI's harness on a trained model, the six of the first Open LLM Leaderboard among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lorafocal.evaluate.result import Result

LEADERBOARD = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")


def evaluate_leaderboard(
    target: str,
    *,
    base: str | None = None,
    tasks: Sequence[str] = LEADERBOARD,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    journal: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Run `tasks` on a run, an adapter (attached to its base, never merged) or a model."""
    raise NotImplementedError
