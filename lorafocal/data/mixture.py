"""Several sources to one training set: joined, split by prompts, and weighted.

What is drawn at random is drawn by a checksum of seed and id (or prompt), so that it depends neither on the order of
the rows nor on the other sources.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from lorafocal.data.hygiene import Key, key
from lorafocal.data.sources import Preference, Preferences
from lorafocal.errors import InputError
from lorafocal.schema.steps import held_out_of

MOST_COPIES = 1000


@dataclass(frozen=True, slots=True)
class Joined:
    """The pairs of several sources under ids that differ, and which source each came from."""

    preferences: Preferences
    source_of: Mapping[str, int]  # id -> position of its source


def join(sources: Sequence[Preferences]) -> Joined:
    """All pairs in order; an id that an earlier source uses already gets a suffix: `7~2` from the second source."""
    pairs: list[Preference] = []
    source_of: dict[str, int] = {}
    for position, source in enumerate(sources):
        for pair in source.pairs:
            unique = (
                pair if pair.id not in source_of else replace(pair, id=unused(f"{pair.id}~{position + 1}", source_of))
            )
            source_of[unique.id] = position
            pairs.append(unique)
    forms = dict.fromkeys(form for source in sources for form in source.form.split(", "))
    bad_rows = [bad_row for source in sources for bad_row in source.bad_rows]
    return Joined(Preferences(pairs, bad_rows, ", ".join(forms)), source_of)


def grouped_by_source(preferences: Preferences, source_of: Mapping[str, int], names: Sequence[str]) -> Preferences:
    """Each pair with its source's name for its group, where there are several sources and no pair names a group.

    `names` are by position of the source; one of several of a name gets its number, as in `a.jsonl~2`.
    """
    if len(names) == 1 or any(pair.group is not None for pair in preferences.pairs):
        return preferences
    groups = [f"{name}~{place + 1}" if name in names[:place] else name for place, name in enumerate(names)]
    return replace(preferences, pairs=[replace(pair, group=groups[source_of[pair.id]]) for pair in preferences.pairs])


def unused(name: str, taken: Container[str]) -> str:
    """The name, longer if somebody has it."""
    while name in taken:
        name += "+"
    return name


def weigh(
    preferences: Preferences,
    source_of: Mapping[str, int],
    weights: Sequence[float],
    *,
    seed: int,
    without: Container[str] = (),
) -> Preferences:
    """Each pair as often as its source's weight says: 2.5 is two copies, and a third of a seeded half of the pairs.

    `weights` are by position of the source; one below 1 leaves a source at least one pair. Copies stand together,
    under the ids `id`, `id#2`, `id#3`. Weigh last: a copy is a duplicate to data/hygiene.py. Pairs whose ids are in
    `without` go with their copies once all are drawn, so that the others stay as they would be with them.
    """
    for position, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MOST_COPIES:
            raise InputError(
                f"the weight of source {position + 1} is {weight!r}; give a number above 0, up to {MOST_COPIES}"
            )
    sizes = Counter(source_of[pair.id] for pair in preferences.pairs)
    room = {
        position: max(round(weights[position] % 1 * size), weights[position] < 1) for position, size in sizes.items()
    }
    drawn: set[str] = set()
    for pair in sorted(preferences.pairs, key=lambda pair: draw(seed, pair.id)):
        if room[source_of[pair.id]] > 0:
            room[source_of[pair.id]] -= 1
            drawn.add(pair.id)
    pairs = [
        replace(pair, id=unused(f"{pair.id}#{copy}", source_of)) if copy > 1 else pair
        for pair in preferences.pairs
        if pair.id not in without
        for copy in range(1, 1 + int(weights[source_of[pair.id]]) + (pair.id in drawn))
    ]
    return replace(preferences, pairs=pairs)


def split_held_out(preferences: Preferences, size: int | float, *, seed: int) -> tuple[Preferences, Preferences]:
    """Training and held-out pairs: `size` pairs (a whole number), or that share of them (a fraction below 1).

    Whole prompts are held out, so that no prompt is on both sides; where they do not add up, fewer pairs are. Rows left
    out stay with the training side. Raises InputError where one side would be empty.
    """
    total = len(preferences.pairs)
    wanted = held_out_pairs(size, total)
    pairs_of: dict[Key, int] = Counter(key(pair.prompt) for pair in preferences.pairs)
    held_out: set[Key] = set()
    for prompt in sorted(pairs_of, key=lambda prompt: draw(seed, repr(prompt))):
        if pairs_of[prompt] <= wanted:
            held_out.add(prompt)
            wanted -= pairs_of[prompt]
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for pair in preferences.pairs:
        sides[key(pair.prompt) in held_out].append(pair)
    if not all(sides):
        empty = "training" if not sides[0] else "held-out"
        raise InputError(
            f"held_out {size!r} of {total} pairs ({len(pairs_of)} prompts, which stay whole) leaves no {empty} pairs; "
            f"{'lower' if not sides[0] else 'raise'} it, or name a file of held-out pairs"
        )
    train, rest = sides
    return replace(preferences, pairs=train), Preferences(rest, [], preferences.form)


def held_out_pairs(size: int | float, total: int) -> int:
    """How many pairs a size or a share means."""
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise InputError(f"held_out is {size!r}; give a number of pairs, or a share between 0 and 1")
    if isinstance(size, float) and not 0 < size < 1:
        raise InputError(f"held_out is {size!r}; a share is between 0 and 1, a number of pairs is whole")
    if isinstance(size, int) and not 0 < size < total:
        raise InputError(f"held_out is {size}; there are {total} pairs: give 1 to {total - 1}, or a share such as 0.05")
    return held_out_of(size, total)


def draw(seed: int, name: str) -> bytes:
    """A place in a random order that depends on seed and name alone."""
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
