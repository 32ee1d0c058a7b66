"""A prompt and an answer to token ids, and where the one ends and the other begins.

The seam. Prompt ids are those of the prompt alone, as in generation. A completion is the rest of the joint
tokenisation where that begins with the prompt ids, and is tokenised alone where a merge crosses the seam;
such pairs are counted. No merge crosses a special token, so both are compared from the prompt's last one on.
Of a completion of several turns each piece is the answer to all before it, so that a turn's ids are those that
generation would give it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal.data.dialogues import DialogueTexts, Pieces, dialogue_texts, has_several_turns
from lorafocal.data.sources import Preference
from lorafocal.data.templates import Fault, PairTexts, Renderer, is_conversation, preference_texts
from lorafocal.data.turns import CONTEXT, Turns, as_told
from lorafocal.errors import InputError

Ids = list[int]
Side = tuple[str, str]  # prompt and answer
Texts = PairTexts | DialogueTexts | Fault


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer, with what is asked of it once for all rows."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    bos: tuple[int, ...]  # what the tokenizer normally writes before plain text: one BOS or nothing
    walls: re.Pattern[str] | None  # special tokens that text is split at before anything else
    control_ids: frozenset[int]  # but that of unknown text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Encoder:
        """The habits of a tokenizer. Leaves its backend without truncation and padding, as every call does."""
        if getattr(tokenizer, "split_special_tokens", False):
            raise InputError(
                "the tokenizer has split_special_tokens on: a turn would not end with its token; switch it off"
            )
        first_id = next(iter(tokenizer("a")["input_ids"]), None)
        bos = (first_id,) if first_id is not None and first_id == tokenizer.bos_token_id else ()
        renderer = Renderer(tokenizer, options)
        added = tokenizer.added_tokens_decoder.values()
        plain = {token.content for token in added if token.special and not (token.normalized or token.single_word)}
        walls = [re.escape(text) for text in renderer.control_tokens if text in plain]
        ids = {tokenizer.convert_tokens_to_ids(text) for text in renderer.control_tokens} - {tokenizer.unk_token_id}
        return cls(tokenizer, renderer, bos, re.compile("|".join(walls)) if walls else None, frozenset(ids))

    def tail_of(self, prompt: str) -> str:
        """The prompt from its last special token on, that included."""
        start = 0
        for match in self.walls.finditer(prompt) if self.walls else ():
            start = match.start()
        return prompt[start:]

    def forges(self, text: str, ids: list[int]) -> bool:
        """Whether there are more control tokens than the text spells: a normalizer read them into something else."""
        written = len(self.renderer.forged.findall(text)) if self.renderer.forged else 0
        return sum(map(self.control_ids.__contains__, ids)) > written


@dataclass(frozen=True, slots=True)
class Seam:
    """Ids of a prompt alone, of its end from the last special token on, and of that end with the answer."""

    prompt_ids: Ids
    tail_ids: Ids
    joint_ids: Ids

    @property
    def holds(self) -> bool:
        return seam_holds(self.tail_ids, self.joint_ids)


@dataclass(frozen=True, slots=True)
class SideIds:
    """Ids of a prompt and one completion, and whether a merge would have crossed the seam."""

    prompt_ids: Ids
    completion_ids: Ids
    merged: bool


@dataclass(frozen=True)
class Reading:
    """How preferences become ids: their texts, the ids of each side, and what begins a prompt and ends an answer.

    `sides` leaves out what it cannot split; `ends` makes prompt, chosen and rejected ids of two sides.
    """

    texts: Callable[[Sequence[Preference], Encoder], list[Texts]]
    sides: Callable[[Iterable[Side], Encoder], dict[Side, SideIds]]
    ends: Callable[[PairTexts, SideIds, SideIds, Encoder], tuple[Ids, Ids, Ids] | Fault]


# ---- as generation sees them


def texts_to_generate(preferences: Sequence[Preference], encoder: Encoder) -> list[Texts]:
    several = [has_several_turns(preference) for preference in preferences]
    one_turn = [preference for preference, has in zip(preferences, several, strict=True) if not has]
    answers = iter(preference_texts(one_turn, encoder.renderer, encoder.bos))
    chats = [preference for preference in preferences if has_several_turns(preference) and is_conversation(preference)]
    dialogues = iter(dialogue_texts(chats, encoder.renderer))
    return [next(dialogues if has else answers) for has in several]


def encode_sides(sides: Iterable[Side], encoder: Encoder) -> dict[Side, SideIds]:
    """Ids by prompt and answer."""
    found = seams(sides, encoder)
    crossed = {side for side, seam in found.items() if not seam.holds}
    rest = encode_inner(encoder.tokenizer, (answer for prompt, answer in found if (prompt, answer) in crossed))
    return {
        side: SideIds(seam.prompt_ids, rest[side[1]], True)
        if side in crossed
        else SideIds(seam.prompt_ids, seam.joint_ids[len(seam.tail_ids) :], False)
        for side, seam in found.items()
    }


def ends_of_texts(texts: PairTexts, chosen: SideIds, rejected: SideIds, encoder: Encoder) -> tuple[Ids, Ids, Ids]:
    """What plain text gets before and after; an answer without tokens stays so."""
    after = texts.ids_after if chosen.completion_ids and rejected.completion_ids else ()
    answers = [[*side.completion_ids, *after] for side in (chosen, rejected)]
    return [*texts.ids_before, *chosen.prompt_ids], answers[0], answers[1]


def sides_of(texts: Texts, encoder: Encoder) -> list[Side]:
    """What is to be encoded: each answer with its prompt, each piece of a dialogue with the end of what it follows."""
    if isinstance(texts, Fault):
        return []
    if isinstance(texts, PairTexts):
        return [(texts.prompt, answer) for answer in texts.answers]
    return [side for pieces in texts.completions for side in sides_of_pieces(texts.prompt, pieces, encoder)]


def sides_of_pieces(prompt: str, pieces: Pieces, encoder: Encoder) -> list[Side]:
    """The first piece with the whole prompt, each other with the text from the last special token before it on."""
    sides, before = [(prompt, pieces[0])], prompt
    for last, piece in pairwise(pieces):
        before = encoder.tail_of(before + last)
        sides.append((before, piece))
    return sides


def dialogue_ids(
    prompt: str, pieces: Pieces, ids: Mapping[Side, SideIds], encoder: Encoder
) -> tuple[SideIds, Turns] | Fault:
    """One completion, with the turn of each token; a fault if it has more control tokens than the template wrote."""
    completion: Ids = []
    turns: list[int] = []
    sides = sides_of_pieces(prompt, pieces, encoder)
    for place, side in enumerate(sides):
        found = ids[side].completion_ids
        if encoder.forges(side[1], found):
            return Fault("control_tokens")
        completion += found
        turns += [CONTEXT if place % 2 else place // 2] * len(found)
    merged = any(ids[side].merged for side in sides)
    return SideIds(ids[sides[0]].prompt_ids, completion, merged), as_told(turns)


TO_GENERATE = Reading(texts_to_generate, encode_sides, ends_of_texts)


# ---- ids


def seams(sides: Iterable[Side], encoder: Encoder) -> dict[Side, Seam]:
    """Equal texts are encoded once, and long prompts not again with each answer."""
    sides = list(dict.fromkeys(sides))
    tails = {prompt: encoder.tail_of(prompt) for prompt, _ in sides}
    alone = encode(encoder.tokenizer, (*tails, *tails.values()))
    joint = encode(encoder.tokenizer, (tails[prompt] + answer for prompt, answer in sides))
    return {
        (prompt, answer): Seam(alone[prompt], alone[tails[prompt]], joint[tails[prompt] + answer])
        for prompt, answer in sides
    }


def seam_holds(prompt_ids: Ids, joint_ids: Ids) -> bool:
    """Whether the joint tokenisation leaves the prompt's tokens as they are."""
    return joint_ids[: len(prompt_ids)] == prompt_ids


def encode_inner(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, Ids]:
    """Token ids by text as they are behind other text: Llama-2's tokenizer and its like put a space before a first."""
    distinct = list(dict.fromkeys(texts))
    found = encode(tokenizer, distinct)  # alone where each anchor melts
    for anchor in _ANCHORS:
        start = encode(tokenizer, [anchor])[anchor]
        if tokenizer.unk_token_id in start:  # which may take what follows into it
            continue
        behind = encode(tokenizer, (anchor + text for text in distinct))
        kept = [text for text in distinct if behind[anchor + text][: len(start)] == start]
        found |= {text: behind[anchor + text][len(start) :] for text in kept}
    return found


# No tokenizer makes one token of a line feed and a letter behind it, so the last one counts; but a second line feed may
# melt with it, as may the space that a tokenizer puts before it.
_ANCHORS = (".", "\n")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, Ids]:
    """Token ids by text in one batch, without special tokens beyond those in the text."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return dict(zip(distinct, encoded["input_ids"], strict=True))
