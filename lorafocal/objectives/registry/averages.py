"""Of answers' lengths, or of mean log-probs a token; most need no reference. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, Entry, Parameter

AVERAGES: dict[str, Entry] = {
    "length-dpo": Entry(
        {"beta": BETA, "alpha": Parameter(0.01, bounds.check_length_alpha, "margin a token is worth; 0 is DPO")},
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
            "gamma_beta_ratio": Parameter(0.5, bounds.check_gamma_beta_ratio, "target margin over beta, nats a token"),
        },
        odds="simpo.simpo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "alphapo": Entry(
        {
            "beta": Parameter(2.5, bounds.check_beta, "scale of the shaped rewards", stated=True),
            "gamma_beta_ratio": Parameter(0.04, bounds.check_gamma_beta_ratio, "target margin over beta"),
            "alpha": Parameter(0.25, bounds.check_shape, "shape of the reward; 0 is SimPO"),
        },
        odds="simpo.alphapo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "cpo": Entry(
        {
            "beta": Parameter(0.1, bounds.check_beta, "scale of whole answers' log-probs, per nat", stated=True),
            "nll_weight": Parameter(1.0, bounds.check_nll_weight, "weight of the chosen answer's nats a token"),
        },
        odds="cpo.cpo",
        beside="cpo.likelihood",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "orpo": Entry(
        {"lambda": Parameter(0.1, bounds.check_lambda, "weight of the odds ratio beside the likelihood")},
        loss="orpo.orpo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
    ),
    "sft": Entry({}, loss="sft.sft", reference=False, rejected=False, implicit_rewards=False, lengths=True),
}
