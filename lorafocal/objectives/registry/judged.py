"""Of a judge's scores beside the log-probs. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

JUDGED: dict[str, Entry] = {
    "odpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                1.0,
                bounds.at_least_zero("alpha", "0 is DPO; the paper's own code has 1"),
                "weight of the log score gap; 0 is DPO",
            ),
        },
        odds="odpo.odpo",
        scores="gap",
    ),
    "omni-dpo": Entry(
        {
            "beta": Parameter(2.0, bounds.check_beta, "scale of the mean log-ratios; 2 to 10", stated=True),
            "eta": Parameter(
                0.7,
                bounds.at_least_zero("eta", "0 weighs all pairs' quality alike; its recipes have 0.7"),
                "quality weight: the score gap's scale",
            ),
            "gamma": Parameter(3.0, bounds.check_hard_gamma, "performance weight: exponent of 1 - p"),
            "tau_ref": Parameter(
                0.8,
                bounds.finite("tau_ref", "its recipes have 0.8 to 2"),
                "performance weight: log-odds that count as fitted",
            ),
            "nll_weight": Parameter(
                0.001,
                bounds.at_least_zero("nll_weight", "0 leaves the likelihood out"),
                "weight of good chosen answers' nats a token",
            ),
            "tau_good": Parameter(
                3.2,
                bounds.finite("tau_good", "its recipe for text has 3.2"),
                "score from which a chosen answer is good",
            ),
        },
        odds="logratio.dpo_norm",
        link="omni.weighted",
        constants="omni.constants",
        beside="omni.calibration",
        implicit_rewards=False,
        lengths=True,
        scores="gap",
    ),
}
