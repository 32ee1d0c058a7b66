"""AlpacaEval 2: win rates against a reference model's answers, computed by the alpaca-eval package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorafocal.evaluate.result import Result

if TYPE_CHECKING:
    from lorafocal.endpoints import Endpoint, Spending  # type: ignore[import-not-found]

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def evaluate_alpaca(
    answers: Path,
    *,
    judge: Endpoint,
    journal: Path,
    approve: Callable[[Spending], bool],
    reference: Path | None = None,
    gamed: Path | None = None,
    annotator: str = ANNOTATOR,
    price: tuple[float, float] | None = None,
    allowed_missing: int = 0,
    annotations_out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Have `judge` compare the answers in `answers` with those in `reference`, prompt by prompt."""
    raise NotImplementedError


def evaluate_annotations(annotations: Path, *, gamed: Path | None = None) -> Result:
    """The win rates of judgments that exist: a file of annotations as alpaca-eval writes it."""
    raise NotImplementedError
