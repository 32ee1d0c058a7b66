"""Of the log-probs of whole answers under policy and reference: FocalPO, DPO and their kin. Imports no torch.

f-DPO with the reverse KL is `dpo`.
"""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

SMOOTHING_CHECK = bounds.between(
    "label_smoothing", 0, 0.5, "0 is DPO, and at 0.5 labels say nothing; published runs have 0.1", below_high=True
)
SMOOTHING = Parameter(0.1, SMOOTHING_CHECK, "rate of labels taken to be flipped; 0 is DPO")
TAU = Parameter(
    0.1,
    bounds.above_zero("tau", "TRL has 0.1; the target is 1 / (2 tau)"),
    "1 over twice the difference of log-ratios that a pair should have, in nats",
    stated=True,
)
SPPO_BETA = Parameter(
    0.001,
    bounds.above_zero("beta", "published runs have 0.001; a sure winner's target is 1 / (2 beta) nats"),
    "the paper's 1 / eta, per nat; published: 0.001",
    stated=True,
)

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
    "dpo-gamma": Entry(
        {
            "beta": BETA,
            "reference_strength": Parameter(
                0.1,
                bounds.at_least_zero("reference_strength", "1 is DPO; the paper tries 0 to 1, its code has 0.1"),
                "of the reference's log-probs; 1 is DPO",
            ),
        },
        odds="logratio.dpo_gamma",
        implicit_rewards=False,
    ),
    "flex-dpo": Entry(
        {
            "beta": BETA,
            "beta_rejected": Parameter(
                0.05,
                bounds.above_zero("beta_rejected", "below beta in the paper; equal to beta it is DPO"),
                "scale of rejected rewards, per nat; below beta, and equal to it is DPO",
                stated=True,
            ),
        },
        odds="logratio.flex_dpo",
        implicit_rewards=False,
    ),
    "dpop": Entry(
        {
            "beta": Parameter(0.3, bounds.check_beta, "scale of the rewards, per nat; the paper has 0.3", stated=True),
            "lambda": Parameter(
                50.0,
                bounds.at_least_zero("lambda", "0 is DPO; the paper has 50"),
                "weight of a chosen reward below 0; 0 is DPO",
            ),
        },
        odds="logratio.dpop",
    ),
    "regularised-rpo": Entry(
        {
            "beta": Parameter(0.01, bounds.check_beta, "scale of the rewards, per nat; published: 0.01", stated=True),
            "eta": Parameter(
                0.005,
                bounds.at_least_zero("eta", "0 is DPO; published runs have 0.005"),
                "weight of beta times the chosen answer's nats; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        beside="anchors.regulariser",
    ),
    "irpo": Entry(
        {
            "beta": BETA,
            "nll_weight": Parameter(
                1.0,
                bounds.at_least_zero("nll_weight", "0 is DPO; published runs have 1"),
                "weight of the chosen answer's nats a token; 0 is DPO",
            ),
        },
        odds=IMPLICIT,
        beside="cpo.likelihood",
        lengths=True,
    ),
    "anchored-dpo": Entry(
        {
            "beta": BETA,
            "anchor": Parameter(
                0.0, bounds.finite("anchor", "published runs have 0"), "reward that chosen answers should exceed"
            ),
        },
        odds=IMPLICIT,
        beside="anchors.anchored",
    ),
    "f-dpo-forward-kl": Entry({"beta": BETA}, odds="f_dpo.forward_kl", implicit_rewards=False),
    "f-dpo-js": Entry({"beta": BETA}, odds="f_dpo.jensen_shannon", implicit_rewards=False),
    "f-dpo-alpha": Entry(
        {
            "beta": BETA,
            "alpha": Parameter(
                0.5,
                bounds.between(
                    "alpha",
                    0,
                    1,
                    "0 would be DPO, 1 f-dpo-forward-kl; the paper tries 0.1 to 0.9",
                    above_low=True,
                    below_high=True,
                ),
                "of the divergence, the paper's; TRL's coefficient is 1 less it",
            ),
        },
        odds="f_dpo.alpha_divergence",
        implicit_rewards=False,
    ),
    "exo": Entry(
        {
            "beta": BETA,
            "label_smoothing": Parameter(
                1e-3,
                bounds.between(
                    "label_smoothing",
                    0,
                    0.5,
                    "at 0 the loss is infinite, at 0.5 labels say nothing; TRL has 0.001, the paper's code 0.000045",
                    above_low=True,
                    below_high=True,
                ),
                "rate of labels taken to be flipped",
            ),
        },
        odds=IMPLICIT,
        link="targets.exo",
    ),
    "discopop": Entry(
        {
            "beta": Parameter(0.05, bounds.check_beta, "scale of the rewards, per nat; published: 0.05", stated=True),
            "tau": Parameter(
                0.05,
                bounds.between(
                    "tau", 0, 1, "above 1 the loss of badly ranked pairs overflows; published: 0.05", above_low=True
                ),
                "log-odds over which the logistic loss gives way to the exponential one",
            ),
        },
        odds=IMPLICIT,
        link="discopop.discopop",
    ),
    "hinge": Entry(
        {
            "beta": Parameter(
                0.05, bounds.check_beta, "scale of the rewards, per nat; SLiC's gamma, RSO has 0.05", stated=True
            )
        },
        loss="hinge.hinge",
    ),
    "ipo": Entry({"tau": TAU}, loss="ipo.ipo", implicit_rewards=False, lengths=True),
    "ipo-sum": Entry({"tau": TAU}, loss="ipo.ipo_sum", implicit_rewards=False),
    "sppo-hard": Entry({"beta": SPPO_BETA}, loss="sppo.sppo_hard"),
}
