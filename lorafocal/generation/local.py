"""Answers by transformers, on this machine: the engine that is always there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from lorafocal.errors import InputError, ran_out
from lorafocal.generation.asks import Ask, Completion, Key
from lorafocal.generation.batches import complete_batch, plan_batches
from lorafocal.generation.presets import Sampling
from lorafocal.generation.subject import Subject, check_room
from lorafocal.model.saved import read_config


class SubjectEngine:
    """What the engines of this machine share: the subject, how its prompts become tokens, and what is noted of both."""

    def __init__(self, subject: Subject, sampling: Sampling, **settings: Any) -> None:
        self.target: Mapping[str, Any] = subject.describe()
        self.ends = subject.ends
        self.settings: Mapping[str, Any] = {
            "template_sha256": subject.template_sha256,
            "stop": sorted(self.ends),
            "dtype": subject.dtype,
            **settings,
        }
        self.subject, self.sampling = subject, sampling
        self.ids: dict[Key, list[int]] = {}
        self._spelling: dict[Key, str] = {}  # those that spell a special token, and where they stand
        self._beyond: dict[Key, str] = {}  # those whose answer may pass the positions that the model was trained on
        config = read_config(subject.place, subject.revision).get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Of an adapter and its base, and of prompts that are read otherwise than they look, or are long."""
        found = [] if self.subject.saved is None else [*self.subject.saved.notes]
        if self._spelling:
            found.append(
                f"{len(self._spelling)} of the prompts spell special tokens of the model (the first:"
                f" {_first(self._spelling)}), which are read as such, as other programs that generate do"
            )
        if self._beyond:
            found.append(
                f"{len(self._beyond)} of the prompts (the first: {_first(self._beyond)}) with"
                f" {self.sampling.max_new_tokens} new tokens pass the model's {self._positions} positions: an answer"
                " that goes so far is not to be trusted"
            )
        return tuple(found)

    def say(self, asks: Sequence[Ask]) -> None:
        """The tokens of each conversation, into `ids`. Raises InputError naming the place of one that is unfit."""
        speech = self.subject.speech
        for ask in asks:
            try:
                ids = speech.conversation_ids(ask.messages)
            except InputError as error:
                raise InputError(f"{ask.place}: {error}") from error
            self.ids[ask.key] = ids
            if any(speech.forged_in(message["content"]) for message in ask.messages):
                self._spelling[ask.key] = ask.place
            if self._positions is not None and len(ids) + self.sampling.max_new_tokens > self._positions:
                self._beyond[ask.key] = ask.place


def _first(places: Mapping[Key, str]) -> str:
    return next(iter(places.values()))


class TransformersEngine(SubjectEngine):
    """A `Subject` in batches of at most `batch_tokens`, padding included (`asks.Engine`)."""

    name = "transformers"

    def __init__(self, subject: Subject, sampling: Sampling, batch_tokens: int) -> None:
        if batch_tokens < 1:
            raise InputError(f"batch_tokens is 1 or more, not {batch_tokens}")
        super().__init__(subject, sampling, batch_tokens=batch_tokens)
        self._batch_tokens = batch_tokens

    def plan(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        """The longest first, so that memory that is short is found out at once."""
        self.say(asks)
        lengths = [len(self.ids[ask.key]) for ask in asks]
        batches = plan_batches(lengths, self.sampling.max_new_tokens, self._batch_tokens)
        return [[asks[place] for place in batch] for batch in batches]

    def answer(self, batch: Sequence[Ask]) -> list[Completion]:
        """One pass of `complete_batch`."""
        rows = [self.ids[ask.key] for ask in batch]
        check_room(self._model, max(map(len, rows)), self.sampling.max_new_tokens)
        keys = [ask.key for ask in batch]
        try:
            return complete_batch(self._model, self.subject.tokenizer, rows, keys, self.sampling, self.ends)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise InputError(
                f"a batch of {len(batch)} answers does not fit the memory: begin again, in another --out, with less"
                f" than --batch-tokens {self._batch_tokens:,}"
            ) from error

    @cached_property
    def _model(self) -> nn.Module:
        return self.subject.load()
