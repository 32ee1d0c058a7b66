"""Preferences to token ids: the same prompt ids on both sides, and every dropped pair with a named reason.

Conversations. The prompt is rendered with the generation prompt, both full conversations are rendered, and a
completion is what a full rendering adds to the prompt's. Nothing is added to what the template writes: no
BOS, no EOS. One thing is taken away: blank text after the token that ends the turn (some templates write a
line feed there), because generation stops at that token and never writes it. A template that does not end the
assistant's turn with a special token is refused, since a model tuned on it would not learn to stop.

Plain text. The prompt gets a BOS where the tokenizer normally adds one, the completion exactly one EOS.

The seam. Prompt ids are those of the prompt alone, as in generation. A completion is the rest of the joint
tokenisation where that begins with the prompt ids, and is tokenised alone where a merge crosses the seam;
such pairs are counted.

Control tokens. Text that spells a special token would become that token, so the pair is dropped: data must
not be able to end a turn or to forge one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorafocal.data.sources import Messages, Preference
from lorafocal.errors import InputError

CHUNK = 1000  # pairs tokenised at a time: a whole data set of tokenizer outputs would not fit in memory
EXAMPLES_PER_REASON = 5

REMEDIES = {
    "control_tokens": "their text spells special tokens of this tokenizer: remove these, and give text that "
    "was rendered with a chat template as message lists instead",
    "empty_prompt": "their prompts have no tokens: give them text",
    "empty_completion": "one of their answers is blank: remove these rows",
    "identical_completions": "both answers have the same tokens, which teaches nothing: remove these rows",
    "overlong": "prompt and answer are longer than max_length tokens: raise max_length",
}


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair; P, C and R tokens, each at least one."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def shared_length(self) -> int:
        """Tokens of the row `[prompt | chosen | rejected]`: P + C + R."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences: P + max(C, R)."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(slots=True)
class TokenizedData:
    """Kept pairs in the order of the data; dropped ones by reason, with up to five ids for each.

    `seam_merges` counts kept and dropped pairs with a completion whose joint tokenisation with the prompt
    would have changed the prompt's tokens.
    """

    pairs: list[TokenizedPair] = field(default_factory=list)
    drops: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seam_merges: int = 0

    def drop(self, pair_id: str, reason: str) -> None:
        """Count one dropped pair."""
        self.drops[reason] = self.drops.get(reason, 0) + 1
        ids = self.examples.setdefault(reason, [])
        if len(ids) < EXAMPLES_PER_REASON:
            ids.append(pair_id)


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Three strings to tokenise, with what a template wrote, and the ids that plain text gets added."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    ids_before: tuple[int, ...] = ()
    ids_after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizerHabits:
    """What is asked of a tokenizer once for all rows."""

    tokenizer: PreTrainedTokenizerBase
    special: tuple[str, ...]  # texts of all special tokens, longest first
    forged: re.Pattern[str] | None  # what spells one of them
    bos: tuple[int, ...]  # what the tokenizer normally writes before plain text: one BOS or nothing

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerHabits:
        """The habits of a tokenizer; special tokens are the named ones and those added as special."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))
        forged = re.compile("|".join(map(re.escape, special))) if special else None
        first_id = next(iter(tokenizer("a")["input_ids"]), None)
        bos = (first_id,) if first_id is not None and first_id == tokenizer.bos_token_id else ()
        return cls(tokenizer, special, forged, bos)


def drop_overlong(pair: TokenizedPair, max_length: int) -> TokenizedPair | None:
    """Leave out a pair of which either sequence is longer than `max_length` tokens."""
    return pair if pair.longest <= max_length else None


TRUNCATIONS: dict[str, Callable[[TokenizedPair, int], TokenizedPair | None]] = {"drop": drop_overlong}


def tokenize_preferences(
    preferences: Iterable[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str = "drop",
) -> TokenizedData:
    """All preferences as token ids; `max_length` is in tokens of the prompt plus one completion.

    A pair is dropped for the first of these reasons that holds: `control_tokens`, `empty_completion`,
    `empty_prompt`, `identical_completions`, `overlong`. Raises InputError for an unknown truncation, a
    tokenizer without what the data needs (chat template, EOS), a template that fails, does not keep its
    prompt or does not end the turn, and when no pair is left.
    """
    if truncation not in TRUNCATIONS:
        raise InputError(f"truncation {truncation!r} is not known; use one of {', '.join(TRUNCATIONS)}")
    if max_length < 2:
        raise InputError(f"max_length is at least 2 tokens (one of the prompt, one of the answer), not {max_length}")
    habits = TokenizerHabits.of(tokenizer)
    preferences = list(preferences)
    data = TokenizedData()
    for start in range(0, len(preferences), CHUNK):
        sound = []
        for preference in preferences[start : start + CHUNK]:
            reason = text_fault(preference, habits)
            if reason:
                data.drop(preference.id, reason)
            else:
                sound.append(preference)
        for pair, merged in tokenize_chunk(sound, habits):
            data.seam_merges += merged
            kept = TRUNCATIONS[truncation](pair, max_length)
            reason = ids_fault(pair) or ("" if kept else "overlong")
            if kept is None or reason:
                data.drop(pair.id, reason)
            else:
                data.pairs.append(kept)
    if not data.pairs:
        raise nothing_left(data, max_length)
    return data


def nothing_left(data: TokenizedData, max_length: int) -> InputError:
    """Why no pair is left, and what to do about each reason."""
    if not data.drops:
        return InputError("there are no preferences to tokenize; give at least one")
    reasons = "; ".join(
        f"{count} {reason} (such as {data.examples[reason][0]}): {REMEDIES[reason]}"
        for reason, count in data.drops.items()
    )
    limit = f", max_length being {max_length} tokens" if "overlong" in data.drops else ""
    return InputError(f"every pair was dropped{limit}. {reasons}")


# ---- faults


def text_fault(preference: Preference, habits: TokenizerHabits) -> str:
    """The reason to drop a preference that its text gives, or an empty string."""
    sides = [contents(side) for side in (preference.prompt, preference.chosen, preference.rejected)]
    if habits.forged and any(habits.forged.search(text) for side in sides for text in side):
        return "control_tokens"
    if any(not "".join(side).strip() for side in sides[1:]):
        return "empty_completion"
    return ""


def contents(side: str | Messages) -> list[str]:
    """The texts of one side."""
    return [side] if isinstance(side, str) else [message["content"] for message in side]


def ids_fault(pair: TokenizedPair) -> str:
    """The reason to drop a pair that its tokens give, or an empty string."""
    if not pair.chosen_ids or not pair.rejected_ids:
        return "empty_completion"
    if not pair.prompt_ids:
        return "empty_prompt"
    if pair.chosen_ids == pair.rejected_ids:
        return "identical_completions"
    return ""


# ---- texts to ids


def tokenize_chunk(preferences: Sequence[Preference], habits: TokenizerHabits) -> list[tuple[TokenizedPair, bool]]:
    """Pairs in order, each with whether a merge would have crossed its seam. Equal texts are encoded once."""
    texts = [pair_texts(preference, habits) for preference in preferences]
    alone = encode(habits.tokenizer, (text.prompt for text in texts))
    joint = encode(
        habits.tokenizer, (text.prompt + answer for text in texts for answer in (text.chosen, text.rejected))
    )
    crossing = {
        (text.prompt, answer)
        for text in texts
        for answer in (text.chosen, text.rejected)
        if not seam_holds(alone[text.prompt], joint[text.prompt + answer])
    }
    rest = encode(habits.tokenizer, (answer for _, answer in crossing))

    def completion_ids(prompt: str, answer: str) -> list[int]:
        return rest[answer] if (prompt, answer) in crossing else joint[prompt + answer][len(alone[prompt]) :]

    pairs = []
    for text in texts:
        prompt_ids = [*text.ids_before, *alone[text.prompt]]
        chosen_ids = completion_ids(text.prompt, text.chosen)
        rejected_ids = completion_ids(text.prompt, text.rejected)
        if chosen_ids and rejected_ids:
            chosen_ids, rejected_ids = [*chosen_ids, *text.ids_after], [*rejected_ids, *text.ids_after]
        check_one_bos(prompt_ids, text.id, habits.tokenizer)
        merged = not crossing.isdisjoint({(text.prompt, text.chosen), (text.prompt, text.rejected)})
        pairs.append((TokenizedPair(text.id, prompt_ids, chosen_ids, rejected_ids), merged))
    return pairs


def seam_holds(prompt_ids: list[int], joint_ids: list[int]) -> bool:
    """Whether the joint tokenisation leaves the prompt's tokens as they are."""
    return joint_ids[: len(prompt_ids)] == prompt_ids


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids by text in one batch, without special tokens beyond those in the text."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def check_one_bos(prompt_ids: list[int], pair_id: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A doubled BOS comes from the template or tokenizer alone, since text that spells one was dropped."""
    bos = tokenizer.bos_token_id
    if bos is not None and prompt_ids[:2] == [bos, bos]:
        raise InputError(f"{pair_id}: the chat template writes BOS twice at the start; remove one from the template")


# ---- preferences to texts


def pair_texts(preference: Preference, habits: TokenizerHabits) -> PairTexts:
    """The three texts of a preference, rendered if it is a conversation."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return PairTexts(preference.id, prompt, chosen, rejected, habits.bos, one_eos(habits.tokenizer))
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        raise InputError(f"{preference.id}: strings and message lists are mixed; give all three in the same form")
    asked = render(prompt, habits.tokenizer, preference.id, add_generation_prompt=True)
    return PairTexts(
        preference.id,
        asked,
        rendered_answer(prompt + chosen, asked, habits, preference.id),
        rendered_answer(prompt + rejected, asked, habits, preference.id),
    )


def one_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[int]:
    """The EOS that ends a plain answer."""
    if tokenizer.eos_token_id is None:
        raise InputError("plain answers end with an EOS token and this tokenizer has none; set tokenizer.eos_token")
    return (tokenizer.eos_token_id,)


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    pair_id: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text by the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{pair_id}: a conversation needs a chat template and this tokenizer has none; use an "
            "instruction-tuned model's tokenizer, set tokenizer.chat_template, or give plain strings"
        )
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InputError(
            f"{pair_id}: the chat template refuses this conversation ({error}); change its roles or their order"
        ) from error
    return str(rendered)


def rendered_answer(conversation: Messages, asked: str, habits: TokenizerHabits, pair_id: str) -> str:
    """What the full rendering adds to the prompt's, up to and with the token that ends the turn."""
    full = render(conversation, habits.tokenizer, pair_id)
    if not full.startswith(asked):
        same = next((i for i, (a, b) in enumerate(zip(full, asked, strict=False)) if a != b), len(full))
        raise InputError(
            f"{pair_id}: the chat template does not keep its prompt when the answer follows: it writes "
            f"{asked[same : same + 40]!r} before an answer, but {full[same : same + 40]!r} in the whole "
            "conversation. Set a chat template whose conversation begins with its prompt"
        )
    answer = full[len(asked) :].rstrip()
    if not answer.endswith(habits.special):
        raise InputError(
            f"{pair_id}: the chat template ends the assistant's turn with {answer[-20:]!r}, not with a "
            "special token, so a model would not learn to stop; write eos_token after that message"
        )
    return answer
