"""Preferences to token ids: the same prompt ids on both sides, and every dropped pair with a named reason.

Texts are read as generation sees them (`encoding.py`), and for `truncation: recipe` as its era did (`era.py`).

Control tokens. Text that spells one would become that token, so the pair is dropped: data must not be able
to end a turn or to forge one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorafocal.data.columns import FurtherAnswer
from lorafocal.data.dialogues import DialogueTexts
from lorafocal.data.encoding import TO_GENERATE, Encoder, Reading, Side, SideIds, dialogue_ids, sides_of
from lorafocal.data.era import AS_IN_ITS_ERA
from lorafocal.data.messages import contents, said_in
from lorafocal.data.sources import Preference
from lorafocal.data.templates import Fault, PairTexts, Renderer, is_conversation
from lorafocal.data.truncation import Limits, check_limits, truncate, why_too_long
from lorafocal.data.turns import Turns, scored_count
from lorafocal.errors import InputError

CHUNK = 1000  # pairs tokenised at a time: a whole data set of tokenizer outputs would not fit in memory
EXAMPLES_PER_REASON = 5

# A pair's fields as files hold them; the turns only where completions have several.
SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
TURNS = ("chosen_turns", "rejected_turns")

REMEDIES = {
    "control_tokens": "their text spells special tokens of this tokenizer: remove these, and give text that "
    "was rendered with a chat template as message lists instead",
    "undecodable_text": "their text holds half of a surrogate pair, which no tokenizer reads: repair the text",
    "template_refuses": "the chat template refuses these conversations: change their roles or their order",
    "text_left_out": "the chat template leaves out text of these conversations: change the roles of their "
    "messages, or use a chat template that writes them",
    "turn_rewritten": "the chat template writes a turn otherwise once the conversation goes on (without its reasoning, "
    "or its end), so that later turns would follow what was never generated: use a chat template that keeps turns as "
    "they were written, or give these rows as one answer each",
    "empty_prompt": "their prompts have no tokens: give them text",
    "empty_completion": "one of their answers is blank: remove these rows",
    "identical_completions": "both answers have the same tokens (after truncation, if they were cut), which "
    "teaches nothing: remove these rows",
    "seam_lost": "truncation: recipe splits prompt and answer as its era did, and where a merge joins the end of the "
    "prompt to an answer, that leaves the two answers different prompts: give message lists, end such prompts with a "
    "line feed, or use another truncation",
    "prompt_fills_length": "their prompts leave no token of max_length to an answer: raise max_length",
    "overlong": "prompt and answer are longer than max_length tokens: raise max_length",
}


@dataclass(frozen=True, slots=True)
class OtherAnswer:
    """A further answer that goes with a pair: to its prompt, or to a longer one, such as the question why."""

    prompt_ids: list[int]
    completion_ids: list[int]
    score: float | None = None
    reference: float | None = None  # its summed log-prob in nats, where it was looked up


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair; P, C and R tokens, each at least one. Scores are a judge's, where the data has them.

    `reference` are the reference's summed log-probs of chosen and rejected in nats, where they were looked up, and
    `reference_tokens` those of their scored tokens. `embedding` is the prompt's, `group` whatever its rows are told
    apart by. `chosen_turns` and `rejected_turns` say of a completion of several turns which of its tokens are scored
    (`data/turns.py`), and are None where there is one.
    """

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    score_chosen: float | None = None
    score_rejected: float | None = None
    reference: tuple[float, float] | None = None
    reference_tokens: tuple[Tensor, Tensor] | None = None  # (C,) and (R,)
    others: tuple[OtherAnswer, ...] = ()
    group: str | None = None
    embedding: tuple[float, ...] | None = None
    chosen_turns: Turns = None  # C turns, or CONTEXT
    rejected_turns: Turns = None  # R

    @property
    def shared_length(self) -> int:
        """Tokens of the row `[prompt | chosen | rejected]`, P + C + R, and of those of further answers by twos."""
        own = len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)
        rows = ((two[0].prompt_ids, *(other.completion_ids for other in two)) for two in by_twos(self.others))
        return own + sum(len(part) for row in rows for part in row)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence: P + max(C, R), or of a further answer with its prompt."""
        own = len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))
        return max([own, *(len(other.prompt_ids) + len(other.completion_ids) for other in self.others)])

    @property
    def several_turns(self) -> bool:
        """Whether a completion has more than one turn of the assistant's."""
        return self.chosen_turns is not None or self.rejected_turns is not None

    @property
    def scored_tokens(self) -> tuple[int, int]:
        """Tokens that are scored of the chosen and of the rejected completion."""
        return scored_count(self.chosen_ids, self.chosen_turns), scored_count(self.rejected_ids, self.rejected_turns)


Further = TypeVar("Further", FurtherAnswer, OtherAnswer)


def by_twos(others: Sequence[Further]) -> Iterator[Sequence[Further]]:
    """Neighbours to the same prompt together, two at most, in their order: they are read, and packed, as pairs are."""
    start = 0
    while start < len(others):
        two = others[start : start + 2]
        if _prompt(two[0]) != _prompt(two[-1]):
            two = two[:1]
        yield two
        start += len(two)


def _prompt(other: FurtherAnswer | OtherAnswer) -> Any:
    return other.prompt if isinstance(other, FurtherAnswer) else other.prompt_ids


@dataclass(slots=True)
class TokenizedData:
    """Kept pairs in the order of the data; dropped ones by reason.

    For each reason `examples` holds up to five places, and `details` what was found at the first of them, where
    there is something to say. `seam_merges` counts kept and dropped pairs with a completion whose joint
    tokenisation with the prompt would have changed the prompt's tokens; `cut` counts kept pairs that lost tokens.
    """

    pairs: list[TokenizedPair] = field(default_factory=list)
    drops: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seam_merges: int = 0
    cut: int = 0
    details: dict[str, str] = field(default_factory=dict)

    def drop(self, place: str, fault: Fault) -> None:
        """Count one dropped pair."""
        self.drops[fault.reason] = self.drops.get(fault.reason, 0) + 1
        places = self.examples.setdefault(fault.reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(place)
        if len(places) == 1 and fault.detail:
            self.details[fault.reason] = fault.detail


def tokenize_preferences(
    preferences: Iterable[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str = "drop",
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    others: bool = False,
) -> TokenizedData:
    """All preferences as token ids; `max_length` is in tokens of the prompt plus one completion.

    `truncation` is one of `TRUNCATIONS`, `max_prompt_length` belongs to `recipe` alone, and
    `chat_template_kwargs` are given to every rendering. Further answers are read with `others` alone. A pair is dropped
    for the first reason that holds, in the order of `REMEDIES`. Raises InputError for settings that would have no
    effect, a tokenizer without what the data needs (chat template, EOS), a template that does not keep its prompt or
    does not end the turn, and when no pair is left.
    """
    check_limits(truncation, max_length, max_prompt_length)
    preferences = list(preferences)
    options = dict(chat_template_kwargs or {})
    if options and not any(is_conversation(preference) for preference in preferences):
        raise InputError("chat_template_kwargs are given, but all rows are plain strings; leave them out")
    encoder = Encoder.of(tokenizer, options)
    reading = AS_IN_ITS_ERA if truncation == "recipe" else TO_GENERATE
    limits = Limits(max_length, max_prompt_length, tokenizer.bos_token_id)
    data = TokenizedData()
    for start in range(0, len(preferences), CHUNK):
        chunk = preferences[start : start + CHUNK]
        for preference, tokenized in zip(chunk, tokenize_rows(chunk, encoder, reading, others), strict=True):
            place = preference.where
            if isinstance(tokenized, Fault):
                data.drop(place, tokenized)
                continue
            pair, merged = tokenized
            data.seam_merges += merged
            kept = truncate(pair, truncation, limits) if not (fault := ids_fault(pair)) else None
            if kept is None:
                data.drop(place, fault or Fault(why_too_long(pair, truncation, max_length)))
            elif fault := ids_fault(kept):
                data.drop(place, fault)
            else:
                data.cut += kept is not pair
                data.pairs.append(with_columns(kept, preference))
    if not data.pairs:
        raise nothing_left(data, max_length)
    return data


def nothing_left(data: TokenizedData, max_length: int) -> InputError:
    """Why no pair is left, and what to do about each reason."""
    if not data.drops:
        return InputError("there are no preferences to tokenize; give at least one")
    reasons = "; ".join(
        f"{count} {reason} (such as {data.examples[reason][0]}"
        f"{': ' + data.details[reason] if reason in data.details else ''}): {REMEDIES[reason]}"
        for reason, count in data.drops.items()
    )
    limit = f", max_length being {max_length} tokens" if {"overlong", "prompt_fills_length"} & set(data.drops) else ""
    return InputError(f"every pair was dropped{limit}. {reasons}")


# ---- faults


def text_fault(preference: Preference, renderer: Renderer) -> Fault | None:
    """The reason to drop a preference that its text gives."""
    sides = [contents(side) for side in (preference.prompt, preference.chosen, preference.rejected)]
    for text in (text for side in sides for text in side):
        if renderer.forged and (found := renderer.forged.search(text)):
            return Fault("control_tokens", repr(found.group()))
        if not text.isascii() and _half_surrogate(text):
            return Fault("undecodable_text")
    if any(not said.strip() for side in (preference.chosen, preference.rejected) for said in said_in(side)):
        return Fault("empty_completion")
    return None


def _half_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def ids_fault(pair: TokenizedPair) -> Fault | None:
    """The reason to drop a pair that its tokens give."""
    if not pair.prompt_ids:
        return Fault("empty_prompt")
    if not pair.chosen_ids or not pair.rejected_ids:
        return Fault("empty_completion")
    if pair.chosen_ids == pair.rejected_ids:
        return Fault("identical_completions")
    if not all(other.prompt_ids and other.completion_ids for other in pair.others):
        return Fault("empty_completion", "a further answer")
    return None


def with_columns(pair: TokenizedPair, preference: Preference) -> TokenizedPair:
    """The pair with what the row has beside texts."""
    if preference.group is None and preference.embedding is None:
        return pair
    return replace(pair, group=preference.group, embedding=preference.embedding)


# ---- texts to ids


def tokenize_rows(
    preferences: Sequence[Preference], encoder: Encoder, reading: Reading, others: bool
) -> list[Fault | tuple[TokenizedPair, bool]]:
    """As `tokenize_chunk`; with `others`, further answers are read too, and one that cannot be drops its pair."""
    pairs = tokenize_chunk(preferences, encoder, reading)
    if not others:
        return pairs
    twos = [[*by_twos(preference.others)] for preference in preferences]
    read = iter(
        tokenize_chunk(
            [_as_pair(preference, two) for preference, of_row in zip(preferences, twos, strict=True) for two in of_row],
            encoder,
            reading,
        )
    )
    return [
        _with_others(pair, preference.others, [(len(two), next(read)) for two in of_row])
        for pair, preference, of_row in zip(pairs, preferences, twos, strict=True)
    ]


def _as_pair(preference: Preference, two: Sequence[FurtherAnswer]) -> Preference:
    """One or two further answers in the place of a pair's, the one twice."""
    prompt = preference.prompt if two[0].prompt is None else two[0].prompt
    return Preference(prompt, two[0].answer, two[-1].answer, preference.id, place=preference.place)


def _with_others(
    pair: Fault | tuple[TokenizedPair, bool],
    others: Sequence[FurtherAnswer],
    twos: Sequence[tuple[int, Fault | tuple[TokenizedPair, bool]]],
) -> Fault | tuple[TokenizedPair, bool]:
    """A pair with its further answers, which were read by twos, of one or two each."""
    if isinstance(pair, Fault):
        return pair
    whole, merged = pair
    read: list[OtherAnswer] = []
    for count, two in twos:
        if isinstance(two, Fault):
            return Fault(two.reason, ": ".join(filter(None, ("a further answer", two.detail))))
        found, merges = two
        merged |= merges
        prompt_ids = whole.prompt_ids if found.prompt_ids == whole.prompt_ids else found.prompt_ids
        for ids in (found.chosen_ids, found.rejected_ids)[:count]:
            read.append(OtherAnswer(prompt_ids, ids, others[len(read)].score))
    return replace(whole, others=tuple(read)), merged


def tokenize_chunk(
    preferences: Sequence[Preference], encoder: Encoder, reading: Reading
) -> list[Fault | tuple[TokenizedPair, bool]]:
    """For each preference its pair, with whether a merge would have crossed its seam, or the reason to drop it."""
    faults = [text_fault(preference, encoder.renderer) for preference in preferences]
    sound = [preference for preference, fault in zip(preferences, faults, strict=True) if fault is None]
    rendered = iter(reading.texts(sound, encoder))
    texts = [next(rendered) if fault is None else fault for fault in faults]
    ids = reading.sides([side for text in texts for side in sides_of(text, encoder)], encoder)
    return [
        text
        if isinstance(text, Fault)
        else tokenized_dialogue(preference, text, ids, encoder)
        if isinstance(text, DialogueTexts)
        else tokenized_pair(preference, text, ids, encoder, reading)
        for preference, text in zip(preferences, texts, strict=True)
    ]


def tokenized_pair(
    preference: Preference, text: PairTexts, ids: Mapping[Side, SideIds], encoder: Encoder, reading: Reading
) -> Fault | tuple[TokenizedPair, bool]:
    """The pair of a preference's texts; a fault if there are more control tokens than the template wrote."""
    chosen, rejected = (ids.get((text.prompt, answer)) for answer in text.answers)
    if chosen is None or rejected is None:
        return Fault("seam_lost")
    said = (
        (text.prompt, chosen.prompt_ids),
        (text.chosen, chosen.completion_ids),
        (text.rejected, rejected.completion_ids),
    )
    if any(encoder.forges(*spelled) for spelled in said):
        return Fault("control_tokens")
    ended = reading.ends(text, chosen, rejected, encoder)
    if isinstance(ended, Fault):
        return ended
    check_one_bos(ended[0], preference.where, encoder.tokenizer)
    pair = TokenizedPair(preference.id, *ended, preference.score_chosen, preference.score_rejected)
    return pair, chosen.merged or rejected.merged


def tokenized_dialogue(
    preference: Preference, text: DialogueTexts, ids: Mapping[Side, SideIds], encoder: Encoder
) -> Fault | tuple[TokenizedPair, bool]:
    """The pair of a preference with completions of several turns."""
    sides = []
    for pieces in text.completions:
        found = dialogue_ids(text.prompt, pieces, ids, encoder)
        if isinstance(found, Fault):
            return found
        sides.append(found)
    (chosen, chosen_turns), (rejected, rejected_turns) = sides
    if encoder.forges(text.prompt, chosen.prompt_ids):
        return Fault("control_tokens")
    check_one_bos(chosen.prompt_ids, preference.where, encoder.tokenizer)
    pair = TokenizedPair(
        preference.id,
        chosen.prompt_ids,
        chosen.completion_ids,
        rejected.completion_ids,
        preference.score_chosen,
        preference.score_rejected,
        chosen_turns=chosen_turns,
        rejected_turns=rejected_turns,
    )
    return pair, chosen.merged or rejected.merged


def check_one_bos(prompt_ids: list[int], place: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A doubled BOS comes from the template or tokenizer alone, since text that spells one was dropped."""
    bos = tokenizer.bos_token_id
    if bos is not None and prompt_ids[:2] == [bos, bos]:
        raise InputError(f"{place}: the chat template writes BOS twice at the start; remove one from the template")
