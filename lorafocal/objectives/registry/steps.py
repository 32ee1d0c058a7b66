"""Of all pairs of a step at once. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter

EVENNESS = Parameter(
    10.0,
    bounds.above_zero("tau", "its recipes have 10 and 20, and 3 for one model"),
    "how evenly targets are shared out; the larger, the more alike",
)

STEPS: dict[str, Entry] = {
    "kto": Entry(
        {
            "beta": BETA,
            "desirable_weight": Parameter(
                1.0,
                bounds.above_zero("desirable_weight", "1 weighs both kinds of answers alike"),
                "weight of chosen answers",
            ),
            "undesirable_weight": Parameter(
                1.0,
                bounds.above_zero("undesirable_weight", "1 weighs both kinds of answers alike"),
                "weight of rejected answers",
            ),
        },
        loss="kto.kto",
        whole_step=True,
    ),
    "dr-dpo": Entry(
        {
            "beta": BETA,
            "beta_prime": Parameter(
                1.0,
                bounds.above_zero("beta_prime", "the paper uses 1, and 1e9 is DPO"),
                "nats of loss that pairs are told apart by; a large one is DPO",
            ),
        },
        odds=IMPLICIT,
        over="dr_dpo.robust_mean",
        whole_step=True,
    ),
    "beta-dpo": Entry(
        {
            "beta": BETA,
            "sensitivity": Parameter(
                0.6,
                bounds.at_least_zero("sensitivity", "0 keeps beta; the paper uses 0.6"),
                "of beta to the step's mean margin, per nat; 0 keeps beta",
            ),
            "filtered_share": Parameter(
                0.2,
                bounds.between("filtered_share", 0, 1, "0 keeps all; the paper uses 0.2", below_high=True),
                "pairs of a step that are left out; 0 keeps all",
            ),
            "momentum": Parameter(
                0.9,
                bounds.between("momentum", 0, 1, "the paper uses 0.9", below_high=True),
                "what the running mean and deviation keep each step",
            ),
        },
        odds="beta_dpo.log_odds",
        over="beta_dpo.of_kept",
        draws=True,
        whole_step=True,
        state=True,
    ),
    "gamma-po": Entry(
        {
            "beta": BETA,
            "gamma_beta_ratio": Parameter(
                0.4,
                bounds.at_least_zero("gamma_beta_ratio", "0 is DPO"),
                "mean target margin over beta; 0 is DPO",
                stated=True,
            ),
            "tau": EVENNESS,
        },
        odds="gamma_po.gamma_dpo",
        draws=True,
        whole_step=True,
        state=True,
    ),
    "gamma-simpo": Entry(
        {
            "beta": Parameter(10.0, bounds.check_beta, "scale of the mean log-probs; 2.5 to 10", stated=True),
            "gamma_beta_ratio": Parameter(
                0.4,
                bounds.at_least_zero("gamma_beta_ratio", "its recipes have 0.15 to 0.5"),
                "mean target margin over beta, nats a token",
            ),
            "tau": EVENNESS,
        },
        odds="gamma_po.gamma_simpo",
        reference=False,
        implicit_rewards=False,
        lengths=True,
        draws=True,
        whole_step=True,
        state=True,
    ),
    "group-dpo": Entry(
        {
            "beta": BETA,
            "eta": Parameter(
                0.01,
                bounds.at_least_zero(
                    "eta", "0 weighs groups alike; the paper's own code has 0.01 for losses summed over a batch"
                ),
                "rate at which badly learnt groups gain weight; 0 weighs all alike",
            ),
        },
        odds=IMPLICIT,
        over="group_dpo.worst_groups",
        groups=True,
        whole_step=True,
        state=True,
    ),
    "relative-dpo": Entry(
        {
            "beta": BETA,
            "tau": Parameter(
                0.5,
                bounds.above_zero("tau", "the paper uses 0.25 to 0.75"),
                "cosine distance of prompts that counts as far",
            ),
        },
        loss="relative.weighted",
        embeddings=True,
        whole_step=True,
    ),
    "relative-dpo-diagonal": Entry(
        {
            "beta": BETA,
            "diagonal_weight": Parameter(
                0.8,
                bounds.between("diagonal_weight", 0, 1, "1 is DPO; the paper's own code has 0.8"),
                "weight of the pair's own contrast; 1 is DPO",
            ),
        },
        loss="relative.diagonal",
        whole_step=True,
    ),
}
