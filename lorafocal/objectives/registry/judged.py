"""Of a judge's scores beside the log-probs. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

JUDGED: dict[str, Entry] = {
    "odpo": Entry(
        {"beta": BETA, "alpha": Parameter(1.0, bounds.check_alpha, "weight of the log score gap; 0 is DPO")},
        odds="odpo.odpo",
        scores="gap",
    ),
    "omni-dpo": Entry(
        {
            "beta": Parameter(2.0, bounds.check_beta, "scale of the mean log-ratios; 2 to 10", stated=True),
            "eta": Parameter(0.7, bounds.check_eta, "quality weight: the score gap's scale"),
            "gamma": Parameter(3.0, bounds.check_hard_gamma, "performance weight: exponent of 1 - p"),
            "tau_ref": Parameter(0.8, bounds.check_tau_ref, "performance weight: log-odds that count as fitted"),
            "nll_weight": Parameter(0.001, bounds.check_nll_weight, "weight of good chosen answers' nats a token"),
            "tau_good": Parameter(3.2, bounds.check_tau_good, "score from which a chosen answer is good"),
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
