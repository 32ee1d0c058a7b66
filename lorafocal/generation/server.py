"""Answers from a server that speaks OpenAI's chat protocol: it applies the template, and it draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.endpoints import Approve, Endpoint, Price, Question, Reply, Spending, approved, ask
from lorafocal.endpoints.journal import read_journal
from lorafocal.errors import InputError
from lorafocal.generation.asks import Ask, Completion
from lorafocal.generation.presets import Sampling

LENGTH, ENDED = "length", "stop"  # the protocol's words for why an answer ends
DEFAULTS = (
    "the server applied its own chat template, and its own defaults to what the requests leave open (vLLM takes top_k"
    " and a repetition penalty from the model's generation config unless started with --generation-config vllm)"
)


@dataclass(frozen=True, slots=True)
class Terms:
    """Where replies are kept, and what may be spent on them. Without `approve`, nothing."""

    journal: Path
    price: Price | None = None
    approve: Approve | None = None


class ServerEngine:
    """A `generation.asks.Engine` behind an endpoint.

    Replies are kept in the journal of `terms` (as `endpoints.ask` does), so the same call after a kill asks for what
    is missing alone. A drawn answer has the seed `sampling.seed` plus its prompt's place, which a server may or may not
    heed.
    """

    name = "server"

    def __init__(
        self, endpoint: Endpoint, sampling: Sampling, terms: Terms, *, say: Callable[[str], None] = print
    ) -> None:
        """Raises InputError where the endpoint needs a key that is not there."""
        endpoint.credential()
        self._endpoint, self._sampling, self._terms, self._say = endpoint, sampling, terms, say
        self.target: Mapping[str, Any] = {"name": endpoint.model, "kind": "server"}
        self.settings: Mapping[str, Any] = {"template": "the server's"}
        self._replies: dict[str, Reply] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the answers should know; more of it once there are replies."""
        return (DEFAULTS, *_notes(self._endpoint.model, self._replies.values()))

    def plan(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        """One batch: the endpoint's own concurrency, and its journal, are finer."""
        kept = read_journal(self._terms.journal)  # the notes are of these too, where an earlier process asked
        keys = [self._endpoint.key(question_of(each, self._sampling)) for each in asks]
        self._replies |= {key: kept[key] for key in keys if key in kept}
        return [list(asks)] if asks else []

    def answer(self, batch: Sequence[Ask]) -> list[Completion]:
        """An answer to each.

        Raises InputError where the bill is not agreed to, and where a question has no reply, once the others have
        theirs.
        """
        questions = [question_of(each, self._sampling) for each in batch]
        terms = self._terms
        approve = terms.approve or _nobody_agreed
        approved(self._endpoint, questions, journal=terms.journal, price=terms.price, approve=approve)
        replies = ask(self._endpoint, questions, journal=terms.journal, say=self._say)
        if (missing := replies.shortfall()) is not None:
            raise InputError(missing)
        self._replies |= replies.answered
        found = [replies.answered[self._endpoint.key(question)] for question in questions]
        return [Completion(reply.text, reply.completion_tokens, reply.finish_reason != LENGTH) for reply in found]


def question_of(asked: Ask, sampling: Sampling) -> Question:
    """The request for an answer; `top_k`, which the protocol does not know but vLLM does, only where it is wanted."""
    options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if not sampling.greedy:
        options |= {"top_p": sampling.top_p, "seed": (sampling.seed + asked.key[0]) % 2**63}
    if sampling.top_k:
        options["top_k"] = sampling.top_k
    return Question(asked.messages, options)


def _nobody_agreed(_: Spending) -> bool:
    return False


def _notes(model: str, replies: Iterable[Reply]) -> list[str]:
    notes, replies = [], list(replies)
    if names := sorted({reply.model for reply in replies} - {model, ""}):
        notes.append(f"asked for {model}, the server answered as {', '.join(names)}")
    ends = Counter(reply.finish_reason or "no reason" for reply in replies)
    if others := {why: count for why, count in sorted(ends.items()) if why not in (ENDED, LENGTH)}:
        notes.append(
            "answers that neither ended nor were cut: " + ", ".join(f"{n} ({why})" for why, n in others.items())
        )
    if empty := sum(not reply.text for reply in replies):
        notes.append(f"{empty} of the answers {'is' if empty == 1 else 'are'} empty")
    return notes
