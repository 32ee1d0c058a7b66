"""Of further answers to a pair's prompt, or to the question why. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

LOGPS = Parameter(0.01, bounds.check_beta, "scale of whole answers' log-probs, per nat", stated=True)
GOLD = Parameter(
    1.0,
    bounds.at_least_zero("nll_weight", "0 leaves the likelihood out; published runs have 0.05 and 1"),
    "weight of the further answer's nats a token",
)

ANSWERS: dict[str, Entry] = {
    "triple-po": Entry(
        {"beta": LOGPS, "nll_weight": GOLD},
        odds="cpo.cpo",
        beside="answers.likelihood",
        reference=False,
        implicit_rewards=False,
        others="one",
    ),
    "triple-po-length": Entry(
        {
            "beta": Parameter(0.01, bounds.check_beta, "scale of the mean log-probs; 0.01 to 10", stated=True),
            "target_margin": Parameter(
                0.5,
                bounds.at_least_zero("target_margin", "published runs have 0.3 to 10"),
                "that log-odds are lowered by",
            ),
            "nll_weight": GOLD,
        },
        odds="answers.triple_po_length",
        beside="answers.likelihood",
        reference=False,
        implicit_rewards=False,
        lengths=True,
        others="one",
    ),
    "rationale-dpo": Entry(
        {
            "beta": BETA,
            "rationale_scale": Parameter(
                0.1,
                bounds.above_zero("rationale_scale", "published runs have 0.001 to 0.1; without rationales train dpo"),
                "scale of the rationale's log-prob, per nat",
            ),
        },
        odds=IMPLICIT,
        beside="answers.rationale",
        others="one",
    ),
    "xpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                1e-5,
                bounds.at_least_zero("alpha", "0 is DPO; published runs have 1e-5"),
                "weight of the log-probs of answers sampled from the reference, per nat; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        beside="answers.optimism",
        others="one",
    ),
    "selm": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                1e-3,
                bounds.at_least_zero("alpha", "0 is DPO; published runs have 1e-4 and 1e-3"),
                "weight of the rewards of answers sampled from the policy; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        beside="answers.exploration",
        others="one",
    ),
}
