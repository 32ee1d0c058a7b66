"""Of single tokens: weights of their own, or what the whole vocabulary says at each. Imports no torch."""

from __future__ import annotations

from lorafocal.objectives.entry import BETA, IMPLICIT, Entry

TOKENS: dict[str, Entry] = {
    "wpo": Entry(
        {"beta": BETA},
        odds=IMPLICIT,
        link="wpo.weighted",
        constants="wpo.constants",
        lengths=True,
        collisions=True,
    ),
}
