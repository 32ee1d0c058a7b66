"""Of all pairs of a step at once. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

STEPS: dict[str, Entry] = {
    "kto": Entry(
        {
            "beta": BETA,
            "desirable_weight": Parameter(
                1.0,
                bounds.above_zero("desirable_weight", "1 weighs both kinds of answers alike"),
                "weight of chosen answers",
            ),
            "undesirable_weight": Parameter(
                1.0,
                bounds.above_zero("undesirable_weight", "1 weighs both kinds of answers alike"),
                "weight of rejected answers",
            ),
        },
        loss="kto.kto",
        whole_step=True,
    ),
}
