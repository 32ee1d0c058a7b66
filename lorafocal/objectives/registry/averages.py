"""Of answers' lengths, or of mean log-probs a token; most need no reference. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

LENGTH_CHECK = bounds.at_least_zero("alpha", "0 is DPO; published runs have 0.01 to 0.02")
SHAPE_CHECK = bounds.finite("alpha", "0 is SimPO; published runs have 0.25")
NLL_CHECK = bounds.at_least_zero("nll_weight", "0 leaves the likelihood out")
LAMBDA_CHECK = bounds.above_zero("lambda", "the paper has 0.1; without the odds ratio train objective sft")
TARGET_CHECK = bounds.at_least_zero("gamma_beta_ratio", "published runs have 0.1 to 0.8")

AVERAGES: dict[str, Entry] = {
    "length-dpo": Entry(
        {"beta": BETA, "alpha": Parameter(0.01, LENGTH_CHECK, "margin a token is worth; 0 is DPO")},
        odds="logratio.length_dpo",
        lengths=True,
    ),
    "dpo-norm": Entry(
        {"beta": Parameter(5.0, bounds.check_beta, "scale of the mean log-ratios; about 5", stated=True)},
        odds="logratio.dpo_norm",
        implicit_rewards=False,
        lengths=True,
    ),
    "simpo": Entry(
        {
            "beta": Parameter(2.0, bounds.check_beta, "scale of the mean log-probs; 2 to 10", stated=True),
            "gamma_beta_ratio": Parameter(0.5, TARGET_CHECK, "target margin over beta, nats a token"),
        },
        odds="simpo.simpo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "repo": Entry(
        {
            "target_margin": Parameter(
                0.5,
                bounds.at_least_zero("target_margin", "published runs have 0.4 to 0.6"),
                "difference of mean log-probs from which a pair teaches nothing, nats a token; 0.4 to 0.6",
            )
        },
        loss="hinge.repo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "alphapo": Entry(
        {
            "beta": Parameter(2.5, bounds.check_beta, "scale of the shaped rewards", stated=True),
            "gamma_beta_ratio": Parameter(0.04, TARGET_CHECK, "target margin over beta"),
            "alpha": Parameter(0.25, SHAPE_CHECK, "shape of the reward; 0 is SimPO"),
        },
        odds="simpo.alphapo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "cpo": Entry(
        {
            "beta": Parameter(0.1, bounds.check_beta, "scale of whole answers' log-probs, per nat", stated=True),
            "nll_weight": Parameter(1.0, NLL_CHECK, "weight of the chosen answer's nats a token"),
        },
        odds="cpo.cpo",
        beside="cpo.likelihood",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "orpo": Entry(
        {"lambda": Parameter(0.1, LAMBDA_CHECK, "weight of the odds ratio beside the likelihood")},
        loss="orpo.orpo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "sft": Entry({}, loss="sft.sft", reference=False, rejected=False, implicit_rewards=False, lengths=True),
}
