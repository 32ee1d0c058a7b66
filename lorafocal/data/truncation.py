"""What happens to a pair longer than `max_length` tokens: four rules; both sides keep the same prompt in each.

A rule returns the pair itself where it fits, a shorter one where it cuts, and None where the pair is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafocal.data.turns import cut
from lorafocal.errors import InputError

if TYPE_CHECKING:
    from lorafocal.data.tokens import OtherAnswer, TokenizedPair


@dataclass(frozen=True, slots=True)
class Limits:
    """In tokens: of the prompt plus one completion; of the prompt that `recipe` leaves. And the BOS to keep."""

    max_length: int
    max_prompt_length: int | None = None
    bos_token_id: int | None = None


def drop(pair: TokenizedPair, limits: Limits) -> TokenizedPair | None:
    """Leave out a pair of which either sequence is longer than `max_length`."""
    return pair if pair.longest <= limits.max_length else None


def keep_start(pair: TokenizedPair, limits: Limits) -> TokenizedPair | None:
    """As TRL 1.x: both sequences end at `max_length`, an EOS beyond it is lost; no pair is left without an answer."""
    room = limits.max_length - len(pair.prompt_ids)
    if room < 1:
        return None
    return _with_answers_of(pair, room)


def cut_prompt_left(pair: TokenizedPair, limits: Limits) -> TokenizedPair | None:
    """Answers stay whole; the prompt loses tokens from its start, but not a leading BOS, and keeps at least one."""
    room = limits.max_length - (pair.longest - len(pair.prompt_ids))
    prompt = pair.prompt_ids
    if room >= len(prompt):
        return pair
    if room < 1:
        return None
    if prompt[0] != limits.bos_token_id:
        return replace(pair, prompt_ids=prompt[-room:])
    return replace(pair, prompt_ids=[prompt[0], *prompt[len(prompt) - room + 1 :]])


def recipe(pair: TokenizedPair, limits: Limits) -> TokenizedPair | None:
    """As TRL 0.9 to 0.11, SimPO and Zephyr: the prompt's end, then the start of both answers, an EOS lost then.

    A pair that is too long keeps the last `max_prompt_length` prompt tokens, a BOS not excepted. If it still is,
    both answers keep their first `max_length - max_prompt_length` tokens, however short the prompt.
    """
    if pair.longest <= limits.max_length:
        return pair
    assert limits.max_prompt_length is not None  # check_limits
    pair = replace(pair, prompt_ids=pair.prompt_ids[-limits.max_prompt_length :])
    if pair.longest <= limits.max_length:
        return pair
    return _with_answers_of(pair, limits.max_length - limits.max_prompt_length)


def _with_answers_of(pair: TokenizedPair, length: int) -> TokenizedPair:
    """The pair with the first `length` tokens of both answers; itself if none is longer.

    Of several turns the last may lose its end, as the one turn does; what a user said behind the last is taken away.
    """
    if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= length:
        return pair
    chosen_ids, chosen_turns = cut(pair.chosen_ids, pair.chosen_turns, length)
    rejected_ids, rejected_turns = cut(pair.rejected_ids, pair.rejected_turns, length)
    return replace(
        pair,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_turns=chosen_turns,
        rejected_turns=rejected_turns,
    )


Truncation = Callable[["TokenizedPair", Limits], "TokenizedPair | None"]
TRUNCATIONS: dict[str, Truncation] = {
    "drop": drop,
    "keep_start": keep_start,
    "cut_prompt_left": cut_prompt_left,
    "recipe": recipe,
}


def truncate(pair: TokenizedPair, truncation: str, limits: Limits) -> TokenizedPair | None:
    """The pair by one of `TRUNCATIONS`, with its further answers; None where it is dropped.

    Those to the pair's own prompt are cut as its two answers are, so that all of them keep one prompt; one to another
    prompt is cut by itself.
    """
    rule = TRUNCATIONS[truncation]
    if not pair.others:
        return rule(pair, limits)
    family = [other for other in pair.others if other.prompt_ids == pair.prompt_ids]
    longest = max((other.completion_ids for other in family), key=len, default=[])
    two = replace(pair, others=())
    if two.longest < len(two.prompt_ids) + len(longest):  # it stands in for the rejected answer
        two = replace(two, rejected_ids=longest, rejected_turns=None)
    kept = rule(two, limits)
    if kept is None:
        return None
    room = limits.max_length - len(kept.prompt_ids)  # a cut of several turns may leave less than there was room for
    length = room if truncation == "keep_start" else max(len(kept.chosen_ids), len(kept.rejected_ids))
    others: list[OtherAnswer] = []
    for other in pair.others:
        if other.prompt_ids == pair.prompt_ids:
            others.append(replace(other, prompt_ids=kept.prompt_ids, completion_ids=other.completion_ids[:length]))
            continue
        ids = other.completion_ids
        alone = replace(two, prompt_ids=other.prompt_ids, chosen_ids=ids, rejected_ids=ids)
        cut_alone = rule(replace(alone, chosen_turns=None, rejected_turns=None), limits)
        if cut_alone is None:
            return None
        others.append(replace(other, prompt_ids=cut_alone.prompt_ids, completion_ids=cut_alone.chosen_ids))
    rejected_ids, rejected_turns = cut(pair.rejected_ids, pair.rejected_turns, length)
    changed = replace(kept, rejected_ids=rejected_ids, rejected_turns=rejected_turns, others=tuple(others))
    return pair if changed == pair else changed


def why_too_long(pair: TokenizedPair, truncation: str, max_length: int) -> str:
    """The reason for which a rule dropped a pair."""
    prompts = (pair.prompt_ids, *(other.prompt_ids for other in pair.others))
    prompt_fills = truncation != "cut_prompt_left" and max(map(len, prompts)) >= max_length
    return "prompt_fills_length" if prompt_fills else "overlong"


def check_limits(truncation: str, max_length: int, max_prompt_length: int | None) -> None:
    """Refuses an unknown rule, lengths that leave no room, and a prompt length that a rule would not look at."""
    if truncation not in TRUNCATIONS:
        raise InputError(f"truncation {truncation!r} is not known; use one of {', '.join(TRUNCATIONS)}")
    if max_length < 2:
        raise InputError(f"max_length is at least 2 tokens (one of the prompt, one of the answer), not {max_length}")
    if truncation != "recipe":
        if max_prompt_length is not None:
            raise InputError(
                f"max_prompt_length has no effect with truncation: {truncation}; leave it out, or use recipe"
            )
        return
    if max_prompt_length is None:
        raise InputError("truncation: recipe needs max_prompt_length, such as 1800 beside max_length 2048")
    if not 1 <= max_prompt_length < max_length:
        raise InputError(
            f"max_prompt_length is at least 1 and less than max_length ({max_length}), so that both answers keep a "
            f"token, not {max_prompt_length}"
        )
