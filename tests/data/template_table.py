"""The chat templates that ship with TRL, as lorafocal sees them: `python -m tests.data.template_table` writes the page.

Each template gets a tokenizer of single bytes and the tokens that the template mentions, and three conversations
are tokenised through the library: what the page says is what happened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trl
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorafocal.data.sources import Preference
from lorafocal.data.templates import Renderer, cut_after_turn, option_that_keeps
from lorafocal.data.tokens import tokenize_preferences
from lorafocal.errors import InputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "chat-templates.md"
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
NAMES = [path.stem for path in TEMPLATES]

TOKEN_LIKE = re.compile(
    r"<\|[\w ]+\|?>|<\w+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_\w+>|</?s>|\[gMASK\]|<sop>|\[/?INST\]", re.ASCII
)
PLAIN_ADDED = ["<think>", "</think>"]  # added to vocabularies, but not as special tokens

QUESTION, CHOSEN, REJECTED, EARLIER = "Which one?", "Take the red one.", "No idea.", "Hello there."
REASONING = "<think>\nRed is nearer.\n</think>\n\n"


@dataclass(frozen=True)
class Seen:
    """What is seen of one template. `options` are those that plain answers need; `refusal` is empty if accepted."""

    name: str
    keeps_prompt: bool
    own_system_prompt: bool
    think_block: str
    turn_end: str
    writes_date: bool
    generation_markers: bool
    options: dict[str, Any]
    takes_plain: bool
    takes_reasoning: bool
    takes_system: bool
    refusal: str


def read(name: str) -> str:
    return next(path for path in TEMPLATES if path.stem == name).read_text(encoding="utf-8")


@cache
def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """One token a byte, a BOS, an EOS, and every special token that the template mentions."""
    special = ["<bos>", "<eos>", *sorted(set(TOKEN_LIKE.findall(template)))]
    texts = [*special, *PLAIN_ADDED, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={text: place for place, text in enumerate(texts)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def conversations(before_answers: str = "") -> dict[str, Preference]:
    """One question; one under a system message; one after an earlier turn."""
    asked = [{"role": "user", "content": QUESTION}]
    prompts = {
        "single": asked,
        "system": [{"role": "system", "content": "Be brief."}, *asked],
        "turns": [*asked, {"role": "assistant", "content": EARLIER}, *asked],
    }
    answers = [[{"role": "assistant", "content": before_answers + text}] for text in (CHOSEN, REJECTED)]
    return {name: Preference(prompt, *answers, name) for name, prompt in prompts.items()}


def tokenized(template: str, options: dict[str, Any], *, reasoning: bool) -> tuple[list[str], str]:
    """The conversations that are kept, and why the first other one is not."""
    kept, why = [], ""
    for which, preference in conversations(REASONING if reasoning else "").items():
        try:
            tokenize_preferences([preference], tokenizer_for(template), max_length=10**6, chat_template_kwargs=options)
            kept.append(which)
        except InputError as error:
            why = why or str(error)
    return kept, why


@cache
def seen(name: str) -> Seen:
    """One template, rendered and tokenised."""
    template = read(name)
    renderer = Renderer(tokenizer_for(template))
    single: Any = conversations()["single"]
    kept, refusal = tokenized(template, {}, reasoning=False)
    kept_reasoning, _ = tokenized(template, {}, reasoning=True)
    options = {}
    if not kept and (found := option_that_keeps(single.prompt, single.chosen, renderer)):
        options = yaml.safe_load(found)
        kept, refusal = tokenized(template, options, reasoning=False)
    asked, full = (
        str(*renderer.render([single.prompt], add_generation_prompt=True)),
        str(*renderer.render([single.prompt + single.chosen])),
    )
    before, _, opening = asked.partition(QUESTION)
    answer = full[len(asked) :] if full.startswith(asked) else ""
    turn = cut_after_turn(full, renderer)
    return Seen(
        name,
        keeps_prompt=full.startswith(asked),
        own_system_prompt=bool(re.search(r"\w+[,:]? \w+[,:]? \w+", before)),
        think_block="prompt" if "think>" in opening else "answer" if "think>" in answer else "",
        turn_end=next((text for text in renderer.control_tokens if turn.endswith(text)), ""),
        writes_date=renderer.writes_date,
        generation_markers=bool(re.search(r"\{%-?\s*generation", template)),
        options=options,
        takes_plain=bool(kept),
        takes_reasoning=bool(kept_reasoning),
        takes_system="system" in kept or "system" in kept_reasoning,
        refusal="" if kept or kept_reasoning else refusal,
    )


def what_we_do(one: Seen) -> str:
    """The last column."""
    if one.refusal:
        ended = "does not end the turn" if "ends the assistant's turn" in one.refusal else one.refusal
        return f"refused: {ended}"
    if one.options:
        written = ", ".join(f"{name}: {str(value).lower()}" for name, value in one.options.items())
        done = f"with `chat_template_kwargs: {{{written}}}`"
        done += ", or as is if every answer has its reasoning" if one.takes_reasoning else ""
    elif one.takes_plain:
        done = "as is" if one.takes_reasoning else "as is, for answers without reasoning"
    else:
        done = "as is, if every answer has its reasoning"
    return done if one.takes_system else f"{done}; drops conversations with a system message"


INTRODUCTION = """\
# Chat templates

<!-- Written by `python -m tests.data.template_table`; a test compares it with what the library does. -->

A prompt is rendered with the generation prompt, each full conversation without it, and an answer is what the full
conversation adds to its prompt, up to and with the token that ends the turn. That is exact if the conversation begins
with its prompt; where it does not, the error says what the template writes in both and which option helps.
The table shows the {count} templates that ship with TRL {version} (`_training` are TRL's own variants).

- **Keeps**: the conversation begins with its prompt. Where a prompt opens a `<think>` block that the conversation
  leaves out, an answer that closes the block (`</think>`) is taken as it stands, as it was generated.
- **System**: the template writes a system prompt of its own. It is part of the prompt, the same for both answers.
- **Think**: where the template writes a think block for an answer without reasoning. In the prompt it is not scored;
  in the answer it is, equally on both sides. A prompt that opens a block which a plain answer closes at once is not
  what the model is asked in use: `enable_thinking: false` then gives the prompt that is.
- **Date**: the template writes today's date into prompts, so that a run cannot be resumed on another day; state it
  (`chat_template_kwargs: {{date_string: 26 Jul 2024}}`, or whatever variable the template reads).
- **Marks**: the template has `{{% generation %}}` blocks. They are not needed and change nothing.

An option that a template does not read is refused, and so is a message whose text it leaves out.

| template | keeps | system | think | end of turn | date | marks | what we do |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = []
    for one in map(seen, NAMES):
        flags = (one.keeps_prompt, one.own_system_prompt, one.writes_date, one.generation_markers)
        keeps, system, date, marks = ("yes" if flag else "" for flag in flags)
        end = f"`{one.turn_end}`".replace("|", "\\|") if one.turn_end else "none"
        think = one.think_block
        rows.append(
            f"| {one.name} | {keeps or 'no'} | {system} | {think} | {end} | {date} | {marks} | {what_we_do(one)} |"
        )
    text = INTRODUCTION.format(count=len(NAMES), version=version("trl")) + "\n".join(rows) + "\n"
    return re.sub(r" {2,}\|", " |", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
