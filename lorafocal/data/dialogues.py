"""Completions of several turns to texts: each turn of the assistant's as it is generated, and what stands in between.

The conversation is rendered up to each of these turns with the generation prompt, and with the turn: a turn is what the
second adds to the first, up to the token that ends it, as an answer of one message is (`templates.py`). What the next
generation prompt adds to that is context: the line feed behind the token, users, the header of the next turn.

A template that writes a turn otherwise once the conversation goes on, as those do that take its reasoning away, would
have later turns learned behind something that nobody generated: such pairs are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafocal.data.messages import Messages
from lorafocal.data.template_options import template_text
from lorafocal.data.templates import OPENED_THINKING, Fault, Renderer, answer_text, left_out, parted
from lorafocal.errors import InputError

Pieces = tuple[str, ...]  # turn, context, turn, ..., turn


@dataclass(frozen=True, slots=True)
class DialogueTexts:
    """A prompt, and two completions in pieces."""

    prompt: str
    chosen: Pieces
    rejected: Pieces

    @property
    def completions(self) -> tuple[Pieces, Pieces]:
        return self.chosen, self.rejected


def has_several_turns(preference: Any) -> bool:
    """Whether a completion is more than one message."""
    return any(not isinstance(side, str) and len(side) > 1 for side in (preference.chosen, preference.rejected))


def dialogue_texts(chats: Sequence[Any], renderer: Renderer) -> list[DialogueTexts | Fault]:
    """The rendered texts of conversations, in order."""
    if chats:
        template_text(renderer.tokenizer, renderer.options)  # says what to do where there is none
    for chat in chats:
        if any(answer[place]["role"] != "assistant" for answer in (chat.chosen, chat.rejected) for place in (0, -1)):
            raise InputError(
                f"{chat.where}: a completion of several turns begins and ends with a message of the "
                "assistant's: move what comes before into the prompt, and leave out what comes behind"
            )
    ends = [end for chat in chats for answer in (chat.chosen, chat.rejected) for end in _ends(chat.prompt, answer)]
    asked = iter(renderer.render([messages[:-1] for messages in ends], add_generation_prompt=True))
    full = iter(renderer.render(ends))
    return [_dialogue(chat, asked, full, renderer) for chat in chats]


def _ends(prompt: Messages, answer: Messages) -> list[Messages]:
    """The conversation up to and with each turn of the assistant's in `answer`."""
    return [[*prompt, *answer[: place + 1]] for place, message in enumerate(answer) if message["role"] == "assistant"]


def _dialogue(
    chat: Any, asked: Iterator[str | Fault], full: Iterator[str | Fault], renderer: Renderer
) -> DialogueTexts | Fault:
    """The texts of one; takes its renderings from all."""
    sides = []
    for answer in (chat.chosen, chat.rejected):
        ends = _ends(chat.prompt, answer)
        sides.append([(messages, next(asked), next(full)) for messages in ends])
    pieces = []
    for turns in sides:
        found = _pieces(chat, turns, renderer)
        if isinstance(found, Fault):
            return found
        pieces.append(found)
    return DialogueTexts(str(sides[0][0][1]), *pieces)


def _pieces(
    chat: Any, turns: Sequence[tuple[Messages, str | Fault, str | Fault]], renderer: Renderer
) -> Pieces | Fault:
    """One completion; each of `turns` is a conversation that ends with it, asked for, and in full."""
    pieces: list[str] = []
    written, told = "", 0  # the text so far, and the messages in it
    for messages, asked, full in turns:
        if isinstance(asked, Fault):
            return asked
        if isinstance(full, Fault):
            return full
        if not extends(asked, written):
            return Fault("turn_rewritten", _difference(written, asked))
        between = asked[len(written) :]
        new = (message["content"] for message in messages[told:-1] if message["role"] != "assistant")
        if lost := left_out(new, between):
            return lost
        text = answer_text(replace(chat, prompt=messages[:-1]), messages[-1:], asked, full, renderer)
        opened = OPENED_THINKING.search(asked)
        if lost := left_out([messages[-1]["content"]], opened.group() + text if opened else text):
            return lost
        pieces += [between, text] if pieces else [text]
        written, told = asked + text, len(messages)
    return tuple(pieces)


def extends(asked: str, written: str) -> bool:
    """Whether a later rendering keeps what was written before."""
    return asked.startswith(written)


def _difference(written: str, asked: str) -> str:
    """Where a later rendering leaves what was written before."""
    same = parted(written, asked)
    return f"{written[same : same + 30]!r} becomes {asked[same : same + 30]!r}"
