"""Of single tokens: weights of their own, or what the whole vocabulary says at each. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

TOKENS: dict[str, Entry] = {
    "wpo": Entry(
        {"beta": BETA},
        odds=IMPLICIT,
        link="wpo.weighted",
        constants="wpo.constants",
        lengths=True,
        collisions=True,
    ),
    "ld-dpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.5,
                bounds.between("alpha", 0, 1, "1 is DPO; the paper tries 0.1 to 1"),
                "weight of tokens beyond the shorter answer's length; 1 is DPO",
            ),
        },
        odds=IMPLICIT,
        token_weights="ld_dpo.weights",
        implicit_rewards=False,
    ),
    "sampo": Entry({"beta": BETA}, odds=IMPLICIT, token_weights="sampo.weights", implicit_rewards=False, draws=True),
    "bmc": Entry(
        {
            "beta": BETA,
            "delta": Parameter(
                2.0,
                bounds.at_least_zero("delta", "0 is DPO; the published recipes have 1.5 to 3"),
                "most that 1/pi adds to a differing token's weight; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        token_weights="bmc.weights",
        implicit_rewards=False,
        differs=True,
    ),
    "tgdpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.5,
                bounds.at_least_zero("alpha", "0 is DPO; the paper's own code has 0.5"),
                "weight of the guide's reward of a token; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        token_weights="tgdpo.weights",
        implicit_rewards=False,
        guide=True,
    ),
    "dmpo": Entry(
        {
            "beta": BETA,
            "turn_discount": Parameter(
                0.7,
                bounds.between("turn_discount", 0, 1, "the paper's gamma, 0.7 in its code", above_low=True),
                "what a turn counts of the one before it, the paper's gamma",
            ),
        },
        odds=IMPLICIT,
        token_weights="dmpo.weights",
        implicit_rewards=False,
    ),
}
