"""Held-out pairs as questions: a prompt once, as tokens that wait for an answer, and the answer that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal.data.messages import Messages, contents
from lorafocal.data.prepare import Part
from lorafocal.generation.prompts import Prompt
from lorafocal.generation.speech import Speech


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its tokens with the template's opening of an answer, and the chosen answer's text."""

    id: str
    prompt: str | Messages
    ids: Sequence[int]
    chosen: str

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else Prompt(tuple(self.prompt), self.id).instruction


def questions(
    part: Part, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], count: int
) -> tuple[Question, ...]:
    """The first `count` distinct prompts of the pairs that are used, or as many as there are.

    Of pairs with one prompt the first is taken, of a completion of several turns the first one. `options` are the chat
    template's. Prompts are whole, whatever truncation leaves of them in training.
    """
    kept = {pair.id for pair in part.tokens.pairs}
    plain, chat = (Speech.of(tokenizer, options, templated=templated) for templated in (False, True))
    found: dict[str, Question] = {}
    for preference in part.preferences:
        prompt = preference.prompt
        if len(found) == count:
            break
        if preference.id not in kept or (key := repr(prompt)) in found:
            continue
        ids = plain.prompt_ids(prompt) if isinstance(prompt, str) else chat.conversation_ids(prompt)
        answer, *_ = contents(preference.chosen)
        found[key] = Question(preference.id, prompt, ids, answer)
    return tuple(found.values())
