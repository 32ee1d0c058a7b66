"""`flip`: label noise, the answers of some pairs exchanged.

Each pair is drawn by a checksum of seed and id alone: which pairs are flipped changes neither with the order of the
rows nor with the pairs beside them, and those of a smaller share are among those of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lorafocal.data.mixture import draw
from lorafocal.data.sources import Preference
from lorafocal.data.steps.outcome import Outcome
from lorafocal.errors import InputError


def flip(
    pairs: Sequence[Preference], *, share: float, seed: int, scores: Literal["follow", "stay"], where: str
) -> Outcome:
    """`pairs` in their order, about `share` of them with chosen and rejected exchanged.

    Scores `follow` their answers, or `stay` under their names. Raises InputError for a share of less than one pair of
    which none is drawn; where a list leaves out all that were flipped, none is, and that is meant.
    """
    drawn = {pair.id for pair in pairs if is_drawn(pair.id, share=share, seed=seed)}
    if not drawn and share * len(pairs) < 1:
        raise InputError(f"{where}: a share of {share:g} of {len(pairs)} pairs flips none of them; raise it, or remove")
    flipped = [swapped(pair, scores=scores) if pair.id in drawn else pair for pair in pairs]
    words = f"chosen and rejected of {len(drawn)} pairs exchanged"
    return Outcome(flipped, words, {"flipped": len(drawn)})


def is_drawn(name: str, *, share: float, seed: int) -> bool:
    """Whether the pair of this id is flipped."""
    return int.from_bytes(draw(seed, f"flip {name}"), "big") < share * 2.0**128


def swapped(pair: Preference, *, scores: Literal["follow", "stay"] = "follow") -> Preference:
    """A pair judged the other way round."""
    turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    if scores == "stay":
        return turned
    return replace(turned, score_chosen=pair.score_rejected, score_rejected=pair.score_chosen)
