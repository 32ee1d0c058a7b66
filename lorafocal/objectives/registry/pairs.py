"""Of the log-probs of whole answers under policy and reference: FocalPO, DPO and their kin. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

SMOOTHING_CHECK = bounds.between(
    "label_smoothing", 0, 0.5, "0 is DPO, and at 0.5 labels say nothing; published runs have 0.1", below_high=True
)
SMOOTHING = Parameter(0.1, SMOOTHING_CHECK, "rate of labels taken to be flipped; 0 is DPO")

PAIRS: dict[str, Entry] = {
    "focalpo": Entry(
        {"beta": BETA, "gamma": Parameter(0.05, bounds.check_gamma, "FocalPO's exponent; 0 is DPO")},
        odds=IMPLICIT,
        factor="p_gamma",
    ),
    "focalpo-eq3": Entry(
        {"beta": BETA, "gamma": Parameter(0.05, bounds.check_gamma_of_eq3, "exponent of 1/(1-p), to 1; 0 is DPO")},
        odds=IMPLICIT,
        factor="eq3",
    ),
    "focalpo-detached": Entry(
        {"beta": BETA, "gamma": Parameter(0.05, bounds.check_detached_gamma, "exponent of a constant p; 0 is DPO")},
        odds=IMPLICIT,
        factor="detached",
    ),
    "focal-hard": Entry(
        {"beta": BETA, "gamma": Parameter(1.0, bounds.check_hard_gamma, "exponent of 1 - p; 0 is DPO")},
        odds=IMPLICIT,
        factor="hard",
    ),
    "dpo": Entry({"beta": BETA}, odds=IMPLICIT),
    "cdpo": Entry({"beta": BETA, "label_smoothing": SMOOTHING}, odds=IMPLICIT, link="smoothing.smoothed"),
    "robust-dpo": Entry({"beta": BETA, "label_smoothing": SMOOTHING}, odds=IMPLICIT, link="smoothing.debiased"),
    "h-dpo": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.9,
                bounds.above_zero("alpha", "1 is DPO, below 1 a sharper policy; 0.8 to 1.2"),
                "of the policy's log-probs; 1 is DPO",
            ),
        },
        odds="logratio.h_dpo",
        implicit_rewards=False,
    ),
    "dpo-shift": Entry(
        {
            "beta": BETA,
            "rejected_factor": Parameter(
                0.95,
                bounds.between("rejected_factor", 0, 1, "1 is DPO; published runs have 0.55 to 0.99", above_low=True),
                "of rejected rewards; 1 is DPO",
            ),
        },
        odds="logratio.dpo_shift",
        implicit_rewards=False,
    ),
}
