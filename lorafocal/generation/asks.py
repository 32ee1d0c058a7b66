"""What an engine is asked and gives: one answer to each conversation, batch by batch.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Key = tuple[int, ...]  # (place among the prompts, turn), by which the journal knows an answer and tokens are drawn


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation that waits for an answer; `place` says where its prompt stands, for messages."""

    key: Key
    messages: tuple[Mapping[str, str], ...]
    place: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text without special tokens, how many tokens were drawn, and whether the model ended it.

    An answer that reached the limit of new tokens first has `ended` False. `tokens` counts the end too, and is None
    where a server did not say it.
    """

    text: str
    tokens: int | None
    ended: bool


class Engine(Protocol):
    """What answers. Nothing is loaded, sent or paid for before the first `answer`.

    `name` is transformers, vllm or server. `target` says what model answers and `settings` what beside the sampling
    decides its answers (plain values, digests and no paths): a generation goes on only with equal ones.
    """

    name: str
    target: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the answers should know; there may be more once they are there."""

    def plan(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        """All asks of a turn in batches: a function of its arguments alone. Raises InputError for one that is unfit."""

    def answer(self, batch: Sequence[Ask]) -> list[Completion]:
        """An answer to each ask of a batch, in order. Raises InputError where it cannot give them all."""
