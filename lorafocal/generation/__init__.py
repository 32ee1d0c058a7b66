"""Answers to a file of prompts, from an adapter, a model or a server: `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafocal.endpoints import Endpoint


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What a generation left: the file, how many answers, how many were cut at the limit, and what made them."""

    out: Path
    answers: int
    length_limit: int
    engine: str
    notes: tuple[str, ...] = ()


def generate(
    target: str | Path,
    prompts: Path,
    *,
    out: Path,
    preset: str = "greedy",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    system: str | None = None,
    base: str | None = None,
    server: Endpoint | None = None,
    engine: str = "auto",
    batch_tokens: int = 65_536,
    name: str | None = None,
    say: Callable[[str], None] = print,
) -> GenerationReport:
    """Answer the prompts of a file, into `out`."""
    raise NotImplementedError
