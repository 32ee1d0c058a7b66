"""`chunk`: one of several parts of the pairs, as the stages of sDPO (arXiv:2403.19270) take one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from lorafocal.data.mixture import draw
from lorafocal.data.sources import Preference
from lorafocal.data.steps.outcome import Outcome
from lorafocal.errors import InputError
from lorafocal.schema.steps import part_of


def chunk(pairs: Sequence[Preference], *, take: int, of: int, seed: int | None, ordered: bool, where: str) -> Outcome:
    """The `take`-th of `of` parts whose sizes differ by one at most: of `pairs` as they stand where they are `ordered`.

    Otherwise which pair is in which part is drawn by checksums of seed and id, and each part keeps the order of the
    rows. The parts of one `of` hold every pair once. Raises InputError where the part is empty.
    """
    rows = range(len(pairs))
    places = list(rows) if ordered else sorted(rows, key=lambda row: draw(seed or 0, f"chunk {pairs[row].id}"))
    mine = {places[place] for place in part_of(take, of, len(pairs))}
    if not mine:
        raise InputError(f"{where}: chunk {take} of {of} of {len(pairs)} pairs is empty; use fewer chunks")
    how = "of the order" if ordered else "drawn at random"
    return Outcome([pair for row, pair in enumerate(pairs) if row in mine], f"{take} of {of}, {how}")
