"""Of the whole vocabulary at each token: how far the policy is from the reference there. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

VOCABULARY: dict[str, Entry] = {
    "tdpo1": Entry({"beta": BETA}, odds="tdpo.tdpo1", implicit_rewards=False, divergences=True),
    "tdpo2": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.5,
                bounds.at_least_zero("alpha", "0 is DPO; the paper's own code has 0.5"),
                "weight of the divergences; 0 is DPO",
            ),
        },
        odds="tdpo.tdpo2",
        implicit_rewards=False,
        divergences=True,
    ),
    "rrpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.01,
                bounds.at_least_zero("alpha", "0 leaves the divergence out; its code has 0.01 to 0.1"),
                "weight of the chosen answer's divergence, per nat",
            ),
        },
        odds=IMPLICIT,
        beside="rrpo.divergence",
        token_weights="rrpo.weights",
        differs=True,
        implicit_rewards=False,
        divergences=True,
    ),
    "pmpo": Entry(
        {
            "alpha": Parameter(
                0.5,
                bounds.between("alpha", 0, 1, "1 learns from chosen answers alone, 0 from rejected ones"),
                "share of the chosen answers; 1 leaves the rejected ones out",
                stated=True,
            ),
            "beta": Parameter(
                1.0,
                bounds.above_zero("beta", "the paper needs more than 1 - alpha, and tries 0.5 to 2"),
                "weight of the divergence, per nat, above 1 - alpha",
                stated=True,
            ),
        },
        loss="pmpo.pmpo",
        implicit_rewards=False,
        divergences=True,
    ),
}
