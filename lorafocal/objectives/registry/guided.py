"""Of the log-probs of whole answers under policy, reference and a guide. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

GUIDED: dict[str, Entry] = {
    "modpo": Entry(
        {
            "beta": BETA,
            "own_weight": Parameter(
                0.5,
                bounds.between("own_weight", 0, 1, "the paper has 0.1 to 0.9", above_low=True),
                "of this preference, the guide's reward has the rest; 1 is DPO",
            ),
            "guide_beta": Parameter(
                0.1,
                bounds.above_zero("guide_beta", "the beta that the guide was trained with"),
                "scale of the guide's implicit rewards, per nat",
            ),
        },
        odds="guided.modpo",
        implicit_rewards=False,
        guide=True,
    ),
}
