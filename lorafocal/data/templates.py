"""Preferences to texts: a prompt as generation sees it, and what each full conversation adds to it.

Conversations. The prompt is rendered with the generation prompt, both full conversations are rendered, and a
completion is what a full rendering adds to the prompt's. Nothing is added to what the template writes: no
BOS, no EOS. One thing is taken away: what follows the token that ends the turn after a blank (a line feed, or
Phi-3's end of the whole conversation), because generation stops at that token and never writes it.

Refused, because a model would learn something else than it is asked for: a template whose conversation does
not begin with its prompt, and one that does not end the assistant's turn with a token of its own. A message
whose text the template leaves out drops the pair.

Reasoning. Where the prompt opens a think block and the template takes reasoning out of the answers it shows
(DeepSeek-R1), an answer that closes the block is taken as it stands, as it was generated.

Plain text. The prompt gets a BOS where the tokenizer normally adds one, the completion exactly one EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorafocal.data.messages import Messages
from lorafocal.data.sources import Preference
from lorafocal.data.template_options import check_options, template_text, variables, writes_now
from lorafocal.errors import InputError

# A template is somebody else's program: besides its own refusals it fails as programs do.
FAILURES = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)

PROBE_QUESTION, PROBE_ANSWER = "Which one?", "That one."
THINK_TAG = re.compile(r"</?think(ing)?>")  # data may hold it: reasoning is part of an answer
OPENED_THINKING = re.compile(r"<think>\s*\Z")
SWITCHES_AND_BLANKS = re.compile(r"\s|/(?:no_?)?think\b")  # templates turn `/no_think` in a text into a setting


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a pair is dropped: a name of `REMEDIES`, and what was found."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Three strings to tokenise, and the ids that plain text gets added before and after."""

    prompt: str
    chosen: str
    rejected: str
    ids_before: tuple[int, ...] = ()
    ids_after: tuple[int, ...] = ()

    @property
    def answers(self) -> tuple[str, str]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's chat template with the options that every rendering gets."""

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.tokenizer, self.options)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that are not data's to write, longest first.

        These are the special tokens, and added ones that the template puts around a plain question and answer.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        probe = "".join(self.probe_texts) if self.tokenizer.chat_template else ""
        texts |= {token.content for token in added if token.content in probe and not THINK_TAG.fullmatch(token.content)}
        return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))

    @cached_property
    def forged(self) -> re.Pattern[str] | None:
        """What spells a control token."""
        return re.compile("|".join(map(re.escape, self.control_tokens))) if self.control_tokens else None

    @cached_property
    def after_turn(self) -> re.Pattern[str]:
        """A control token at the end of the text, and what follows it after a blank."""
        one = "|".join(map(re.escape, self.control_tokens)) or r"(?!)"
        return re.compile(rf"({one})(?:\s+(?:{one}))+\Z")

    @cached_property
    def probe_texts(self) -> tuple[str, ...]:
        """What the template writes for fixed conversations; what it refuses is left out."""
        asked = [{"role": "user", "content": PROBE_QUESTION}]
        told = [{"role": "system", "content": PROBE_ANSWER}, *asked]
        answer = [{"role": "assistant", "content": PROBE_ANSWER}]
        texts = [
            *self.render([asked, told], add_generation_prompt=True),
            *self.render([asked + answer, told + answer]),
        ]
        return tuple(text for text in texts if isinstance(text, str))

    @property
    def writes_date(self) -> bool:
        """Whether prompts hold today's date: a run then differs from day to day, and cannot be resumed on another."""
        template = template_text(self.tokenizer, self.options)
        return any(writes_now(template, text) for text in self.probe_texts)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template writes text only when it comes in parts, as those of some image models do."""
        asked: Messages = [{"role": "user", "content": PROBE_QUESTION}]
        plain, parts = (self._one(asked, as_parts=as_parts, add_generation_prompt=False) for as_parts in (False, True))
        return not _holds(plain, PROBE_QUESTION) and _holds(parts, PROBE_QUESTION)

    def render(self, conversations: Sequence[Messages], *, add_generation_prompt: bool = False) -> list[str | Fault]:
        """Texts in order; equal conversations are rendered once."""
        keys = [tuple(tuple(message.items()) for message in messages) for messages in conversations]
        distinct = list(dict(zip(keys, conversations, strict=True)).items())
        if not distinct:
            return []
        texts = self._many([messages for _, messages in distinct], add_generation_prompt)
        found = dict(zip((key for key, _ in distinct), texts, strict=True))
        return [found[key] for key in keys]

    def _many(self, conversations: list[Messages], add_generation_prompt: bool) -> Sequence[str | Fault]:
        """In one call; one by one if that fails, so that only those that fail are faults."""
        as_parts = self.takes_parts
        try:
            return self._call([_in_parts(c) if as_parts else c for c in conversations], add_generation_prompt)
        except FAILURES:
            return [self._one(c, as_parts=as_parts, add_generation_prompt=add_generation_prompt) for c in conversations]

    def _one(self, messages: Messages, *, as_parts: bool, add_generation_prompt: bool) -> str | Fault:
        try:
            return self._call([_in_parts(messages) if as_parts else messages], add_generation_prompt)[0]
        except FAILURES as error:
            return Fault("template_refuses", "".join(c if c.isprintable() else " " for c in str(error)[:200]))

    def _call(self, conversations: Sequence[Any], add_generation_prompt: bool) -> list[str]:
        rendered = self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt, **self.options
        )
        return [str(text) for text in rendered]


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _holds(rendered: str | Fault, text: str) -> bool:
    return isinstance(rendered, str) and text in rendered


# ---- preferences to texts


def preference_texts(preferences: Sequence[Preference], renderer: Renderer, bos: Sequence[int]) -> list[Any]:
    """`PairTexts` or a `Fault` for each preference; `bos` is what goes before plain prompts."""
    chats = [preference for preference in preferences if is_conversation(preference)]
    rendered = iter(conversation_texts(chats, renderer))
    eos = one_eos(renderer.tokenizer) if len(chats) < len(preferences) else ()
    return [
        next(rendered)
        if is_conversation(preference)
        else PairTexts(preference.prompt, preference.chosen, preference.rejected, tuple(bos), eos)  # type: ignore[arg-type]
        for preference in preferences
    ]


def is_conversation(preference: Preference) -> bool:
    """Whether all three are message lists; they are strings otherwise, and no mixture."""
    texts = [isinstance(side, str) for side in (preference.prompt, preference.chosen, preference.rejected)]
    if any(texts) and not all(texts):
        raise InputError(f"{preference.where}: strings and message lists are mixed; give all three in the same form")
    return not any(texts)


def one_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The EOS that ends a plain answer."""
    if tokenizer.eos_token_id is None:
        raise InputError("plain answers end with an EOS token and this tokenizer has none; set tokenizer.eos_token")
    return (tokenizer.eos_token_id,)


def conversation_texts(chats: Sequence[Any], renderer: Renderer) -> list[PairTexts | Fault]:
    """The rendered texts of conversations, in order."""
    if chats:
        template_text(renderer.tokenizer, renderer.options)  # says what to do where there is none
    asked = renderer.render([chat.prompt for chat in chats], add_generation_prompt=True)
    full = iter(renderer.render([chat.prompt + answer for chat in chats for answer in (chat.chosen, chat.rejected)]))
    return [
        chat_texts(chat, prompt, next(full), next(full), renderer) for chat, prompt in zip(chats, asked, strict=True)
    ]


def chat_texts(
    chat: Preference, asked: str | Fault, chosen: str | Fault, rejected: str | Fault, renderer: Renderer
) -> PairTexts | Fault:
    """The prompt and what the two full renderings add to it."""
    if isinstance(asked, Fault) or isinstance(chosen, Fault) or isinstance(rejected, Fault):
        return next(text for text in (asked, chosen, rejected) if isinstance(text, Fault))
    lost = left_out((m["content"] for m in chat.prompt if m["role"] != "assistant"), asked)  # type: ignore[index]
    if lost:
        return lost
    opened = OPENED_THINKING.search(asked)
    answers = []
    for answer, full in ((chat.chosen, chosen), (chat.rejected, rejected)):
        text = answer_text(chat, answer, asked, full, renderer)  # type: ignore[arg-type]
        whole = opened.group() + text if opened else text
        lost = left_out((message["content"] for message in answer), whole)  # type: ignore[index]
        if lost:
            return lost
        answers.append(text)
    return PairTexts(asked, answers[0], answers[1])


def left_out(contents: Iterable[str], rendered: str) -> Fault | None:
    """The first text that a rendering lacks, blanks and switches such as `/no_think` aside."""
    for content in contents:
        if content.strip() not in rendered and _bare(content) not in _bare(rendered):
            return Fault("text_left_out", f"{content.strip()[:40]!r}")
    return None


def _bare(text: str) -> str:
    return SWITCHES_AND_BLANKS.sub("", text)


# ---- the answer


def answer_text(chat: Preference, answer: Messages, asked: str, full: str, renderer: Renderer) -> str:
    """What the full rendering adds to the prompt's, up to and with the token that ends the turn."""
    text = cut_after_turn(added_text(chat, answer, asked, full, renderer), renderer)
    if not text.endswith(renderer.control_tokens):
        raise InputError(
            f"{chat.where}: the chat template ends the assistant's turn with {text[-20:]!r}, not with a "
            "special token, so a model would not learn to stop; use a tokenizer whose template writes eos_token "
            "after that message"
        )
    return text


def added_text(chat: Preference, answer: Messages, asked: str, full: str, renderer: Renderer) -> str:
    """What follows the prompt in the full rendering; refused where that does not begin with the prompt."""
    if full.startswith(asked):
        return full[len(asked) :]
    added = generated_reasoning(answer[-1]["content"], asked, full)
    if not added:
        raise prompt_not_kept(chat, answer, asked, full, renderer)
    return added


def cut_after_turn(text: str, renderer: Renderer) -> str:
    """The text without what follows the token that ends the turn after a blank."""
    return renderer.after_turn.sub(r"\1", text.rstrip())


def generated_reasoning(content: str, asked: str, full: str) -> str:
    """An answer that closes the think block its prompt opened, of a template that shows answers without it.

    Such a template writes `<think>` to be generated from, and of an answer only what follows `</think>`. Where
    exactly that is seen, the answer's own text goes back to its place. Empty if it is not.
    """
    opened = OPENED_THINKING.search(asked)
    reasoning, closed, said = content.rpartition("</think>")
    if not opened or not closed:
        return ""
    shown = asked[: opened.start()] + said
    if not full.startswith(shown):
        return ""
    return reasoning.removeprefix(opened.group()).removeprefix("<think>") + closed + said + full[len(shown) :]


def parted(one: str, other: str) -> int:
    """Up to where two texts are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def prompt_not_kept(chat: Preference, answer: Messages, asked: str, full: str, renderer: Renderer) -> InputError:
    """What differs, and the way out that was found by trying."""
    same = parted(full, asked)
    option = option_that_keeps(chat.prompt, answer, renderer)  # type: ignore[arg-type]
    if option:
        way_out = f"Set data.chat_template_kwargs to {option}, which this template keeps its prompt with"
    elif OPENED_THINKING.search(asked):
        way_out = "Give answers with their reasoning, closed by </think>, or a chat template that opens no block"
    else:
        way_out = "Set a chat template whose conversation begins with its prompt"
    return InputError(
        f"{chat.where}: the chat template does not keep its prompt when the answer follows: it writes "
        f"{asked[same : same + 40]!r} before an answer, but {full[same : same + 40]!r} in the whole "
        f"conversation. {way_out}"
    )


def option_that_keeps(prompt: Messages, answer: Messages, renderer: Renderer) -> str:
    """`{enable_thinking: false}` or such, if one switch of the template makes it keep its prompt; else empty."""
    for name in sorted(variables(template_text(renderer.tokenizer, renderer.options))):
        for value in (False, True):
            other = Renderer(renderer.tokenizer, {**renderer.options, name: value})
            [asked] = other.render([prompt], add_generation_prompt=True)
            [full] = other.render([prompt + answer])
            if isinstance(asked, str) and isinstance(full, str) and full.startswith(asked):
                return f"{{{name}: {str(value).lower()}}}"
    return ""
