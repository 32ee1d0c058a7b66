"""What asking will cost, said before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafocal.endpoints.client import library
from lorafocal.endpoints.endpoint import Endpoint, Question
from lorafocal.endpoints.journal import read_journal
from lorafocal.errors import InputError

CHARACTERS_A_TOKEN = 4  # of English text; OpenAI's own rule of thumb
Price = tuple[float, float]  # USD for a million tokens read, and for a million written


@dataclass(frozen=True, slots=True)
class Spending:
    """An estimate: `prompt_tokens` by the rule of thumb, `completion_tokens` at most (None: the answers have no limit).

    `usd` is None where no price was given, and without the answers where these have no limit.
    """

    questions: int
    prompt_tokens: int
    completion_tokens: int | None
    usd: float | None

    def sentence(self) -> str:
        """For the person who is asked whether to go on."""
        written = (
            "no limit on what is written"
            if self.completion_tokens is None
            else (f"at most {self.completion_tokens:,} to write")
        )
        least = "at least " if self.completion_tokens is None else "about "
        price = "no price was given" if self.usd is None else f"{least}{self.usd:.2f} USD"
        asked = f"{self.questions:,} question{'' if self.questions == 1 else 's'}"
        return f"{asked}: about {self.prompt_tokens:,} tokens to read, {written}; {price}"


Approve = Callable[[Spending], bool]


def estimate(questions: Iterable[Question], price: Price | None = None) -> Spending:
    """What it takes to ask all of `questions` once: four characters a token to read, `max_tokens` to write."""
    questions = list(questions)
    read = sum(math.ceil(question.characters / CHARACTERS_A_TOKEN) for question in questions)
    limits = [_limit(question) for question in questions]
    known = [limit for limit in limits if limit is not None]
    usd = None if price is None else (read * price[0] + sum(known) * price[1]) / 1e6
    return Spending(len(questions), read, sum(known) if len(known) == len(limits) else None, usd)


def approved(
    endpoint: Endpoint, questions: Sequence[Question], *, journal: Path, price: Price | None, approve: Approve
) -> Spending:
    """The estimate for what `journal` does not answer yet, once `approve` agreed to it; nothing is asked for nothing.

    Raises InputError where it did not agree, and where the endpoint needs a key or a package that is not there.
    """
    endpoint.credential()
    had = read_journal(journal)
    missing = {key: question for question in questions if (key := endpoint.key(question)) not in had}
    if missing:
        library()  # before anybody agrees to anything
    spending = estimate(missing.values(), price)
    if missing and not approve(spending):
        raise InputError(f"not agreed to {spending.sentence()}: nothing was sent")
    return spending


def _limit(question: Question) -> int | None:
    limit = question.options.get("max_completion_tokens", question.options.get("max_tokens"))
    return None if limit is None else int(limit)
