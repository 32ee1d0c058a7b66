"""How a model is spoken to: texts and conversations to prompt tokens as in training, and the ids that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorafocal.data.encoding import Encoder, encode
from lorafocal.data.held_out import read_held_out
from lorafocal.data.templates import PROBE_ANSWER, PROBE_QUESTION, Fault, Renderer, cut_after_turn
from lorafocal.data.tokens import REMEDIES
from lorafocal.errors import InputError

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Speech:
    """How texts become tokens: as in training, by the chat template, or as plain text (`templated` False)."""

    encoder: Encoder
    templated: bool

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None, *, templated: bool
    ) -> Speech:
        """`options` are the chat template's, `data.chat_template_kwargs` of a run."""
        return cls(Encoder.of(tokenizer, options or {}), templated)

    @classmethod
    def as_trained(
        cls, tokenizer: PreTrainedTokenizerBase, tokenization: Mapping[str, Any], held_out: Path | None
    ) -> Speech:
        """As the run that `tokenization` (its settings) and `held_out` (its pairs, where known) are of."""
        encoder = Encoder.of(tokenizer, tokenization.get("chat_template_kwargs") or {})
        return cls(encoder, _is_templated(encoder, held_out))

    def prompt_ids(self, text: str, system: str | None = None) -> list[int]:
        """The tokens of a prompt, the template's opening of an answer included.

        Raises InputError for a text that no training row may have either, and for one that the template refuses.
        """
        for part in filter(None, (text, system)):
            if found := self.forged_in(part):
                raise InputError(f"the prompt spells the special token {found!r}: write it without")
        messages = [{"role": "system", "content": system}] if system else []
        return self.conversation_ids([*messages, {"role": "user", "content": text}])

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation that waits for an answer; without a template, those of its one text.

        A special token that a text spells is read as one, as other programs that generate do (`forged_in`).
        """
        if not self.templated:
            if len(messages) > 1:
                raise InputError(
                    "prompts are continued as plain text here, so neither a system message nor earlier turns have a"
                    " place: put them into the prompt"
                )
            return [*self.encoder.bos, *self._encoded(messages[0]["content"])]
        [rendered] = self.encoder.renderer.render([[dict(message) for message in messages]], add_generation_prompt=True)
        if isinstance(rendered, Fault):
            raise InputError(f"the prompt cannot be said: {REMEDIES[rendered.reason]} ({rendered.detail})")
        return self._encoded(rendered)

    def forged_in(self, text: str) -> str | None:
        """The first special token that a text spells."""
        forged = self.encoder.renderer.forged
        found = forged.search(text) if forged else None
        return found.group() if found else None

    def _encoded(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt cannot be read: {REMEDIES['undecodable_text']}") from error
        ids = encode(self.encoder.tokenizer, [text])[text]
        if not ids:
            raise InputError("the prompt has no tokens: give it text")
        return ids

    def ends(self, generation: GenerationConfig | None) -> frozenset[int]:
        """The ids that end an answer: the model's own, the tokenizer's EOS, and the template's end of a turn."""
        own = getattr(generation, "eos_token_id", None)
        ids = {*(own if isinstance(own, list) else [own]), self.encoder.tokenizer.eos_token_id}
        if self.templated:
            ids.add(_end_of_turn(self.encoder.renderer))
        return frozenset(int(number) for number in ids if number is not None)


def _end_of_turn(renderer: Renderer) -> int | None:
    """The token that the template writes after an answer."""
    answered = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}]
    [text] = renderer.render([answered])
    if isinstance(text, Fault):
        return None
    text = cut_after_turn(text, renderer)
    token = next((token for token in renderer.control_tokens if text.endswith(token)), None)
    return None if token is None else int(renderer.tokenizer.convert_tokens_to_ids(token))


def _is_templated(encoder: Encoder, held_out: Path | None) -> bool:
    """Whether prompts go through the chat template: where there is one, unless the run's own pairs did not."""
    if not encoder.tokenizer.chat_template:
        return False
    asked = [[{"role": "user", "content": PROBE_QUESTION}]]
    [opened], [closed] = encoder.renderer.render(asked, add_generation_prompt=True), encoder.renderer.render(asked)
    if held_out is None or not held_out.is_file() or isinstance(opened, Fault):
        return True
    endings = [_bare(opened.rpartition(PROBE_QUESTION)[2])]
    if isinstance(closed, str) and (closing := _bare(closed.rpartition(PROBE_QUESTION)[2])):
        endings.append(closing)  # of `truncation: recipe`
    prompts = (encoder.tokenizer.decode(pair.prompt_ids) for pair in read_held_out(held_out))
    return any(_bare(str(prompt)).endswith(tuple(endings)) for prompt in prompts)


def _bare(text: str) -> str:
    """Without blanks, of which decoding makes more or fewer."""
    return "".join(text.split())
