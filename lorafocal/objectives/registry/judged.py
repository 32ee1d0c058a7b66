"""Of a judge's scores beside the log-probs. Imports no torch."""

from __future__ import annotations

from lorafocal import bounds
from lorafocal.objectives.entry import BETA, IMPLICIT, Entry, Parameter
from lorafocal.objectives.registry.pairs import SPPO_BETA

REWARD_AWARE_BETA = Parameter(0.2, bounds.check_beta, "scale of the rewards, per nat; its code has 0.2", stated=True)
ETA = Parameter(
    1.0,
    bounds.above_zero("eta", "its code has 1; this is on the judge's scale"),
    "log-odds that a point of score gap is worth",
)


def _reward_aware(link: str) -> Entry:
    parameters = {"beta": REWARD_AWARE_BETA, "eta": ETA}
    return Entry(parameters, odds=IMPLICIT, link=link, constants="targets.score_gap", scores="ties")


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
    "mappo": Entry({"beta": BETA}, odds="mappo.mappo", implicit_rewards=False, scores="unit"),
    "sppo": Entry({"beta": SPPO_BETA}, loss="sppo.sppo", scores="unit"),
    "reward-aware-squared": _reward_aware("targets.squared"),
    "reward-aware-backward": _reward_aware("targets.to_policy"),
    "reward-aware-forward": _reward_aware("targets.from_policy"),
    "todo": Entry(
        {
            "beta": Parameter(0.01, bounds.check_beta, "scale of the rewards, per nat; published: 0.01", stated=True),
            "alpha": Parameter(
                0.5,
                bounds.above_zero("alpha", "at 0 there are no ties; the paper has 0.5"),
                "half the width of ties, in log-odds",
            ),
        },
        odds="todo.todo",
        link="todo.ternary",
        constants="todo.ties",
        scores="ties",
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
