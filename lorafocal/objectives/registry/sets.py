"""Of all answers to a prompt as one set, each with a judge's score. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

SETS: dict[str, Entry] = {
    "mpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                1.0,
                bounds.at_least_zero("alpha", "0 weighs all answers alike; its scale is the judge's"),
                "what a point from the mean score, up or down, adds to an answer's log-weight; 0 weighs all alike",
                stated=True,
            ),
        },
        odds="mpo.mpo",
        scores="gap",
        others="any",
    ),
    "exo-reward": Entry(
        {
            "beta": Parameter(0.5, bounds.check_beta, "scale of the rewards, per nat; its code has 0.5", stated=True),
            "score_temperature": Parameter(
                0.5,
                bounds.above_zero("score_temperature", "the authors' beta_r, 0.5 for TL;DR; its scale is the judge's"),
                "score that counts as one nat of reward",
                stated=True,
            ),
        },
        loss="exo_reward.exo_reward",
        scores="ties",
        others="any",
    ),
}
