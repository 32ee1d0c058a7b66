"""Completions of several turns: which of their tokens are scored, and in which turn of the assistant's they are.

The turn of each token, from 0, or `CONTEXT`: what users and the template say in between is read, and never scored.
None stands for one turn, all of which is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

Turns = list[int] | None
Item = TypeVar("Item")

CONTEXT = -1


def scored(items: Sequence[Item], turns: Turns) -> Sequence[Item]:
    """Of one item a token those whose token is scored."""
    return items if turns is None else [item for item, turn in zip(items, turns, strict=True) if turn != CONTEXT]


def scored_count(ids: Sequence[int], turns: Turns) -> int:
    """Tokens that are scored."""
    return len(ids) if turns is None else len(ids) - turns.count(CONTEXT)


def scored_turns(ids: Sequence[int], turns: Turns) -> list[int]:
    """The turn of each scored token."""
    return [0] * len(ids) if turns is None else [turn for turn in turns if turn != CONTEXT]


def cut(ids: list[int], turns: Turns, length: int) -> tuple[list[int], Turns]:
    """The first `length` tokens at most, without context that nothing scored follows."""
    if len(ids) <= length:
        return ids, turns
    if turns is None:
        return ids[:length], None
    last = next((place for place in reversed(range(length)) if turns[place] != CONTEXT), -1)
    return ids[: last + 1], as_told(turns[: last + 1])


def as_told(turns: list[int]) -> Turns:
    """None where there is one turn alone."""
    return turns if any(turns) else None


def is_sound(ids: Sequence[int], turns: Turns) -> bool:
    """Whether turns go with `ids`: from turn 0 on, each behind the one before it, the last token scored."""
    if turns is None:
        return True
    if len(turns) != len(ids) or not ids or turns[0] != 0 or turns[-1] == CONTEXT:
        return False
    steps = [after - before for before, after in pairwise(scored_turns(ids, turns))]
    return min(turns) >= CONTEXT and {0, 1}.issuperset(steps)
