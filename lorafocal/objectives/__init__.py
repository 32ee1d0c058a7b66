"""The registry of objectives: what each one needs, and what it is set by. Imports no torch, so that configs can ask it.

One more objective is a pure function in a file of this room, an `Entry` below, and in `lorafocal.bounds` a check of
each parameter that has none yet. The config's section, the fields of `FocalPOConfig` and what is refused follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from lorafocal import bounds
from lorafocal.errors import InputError

if TYPE_CHECKING:
    from lorafocal.objectives.focal import focalpo
    from lorafocal.objectives.objective import Objective, build_objective, mean_loss, objective_from
    from lorafocal.objectives.pairwise import Odds, PairLogps, PairLosses, PairScores, dpo

__all__ = [
    "BETA", "OBJECTIVES", "PARAMETERS", "Entry", "Objective", "Odds", "PairLogps", "PairLosses", "PairScores",
    "Parameter", "build_objective", "dpo", "entry_of", "focalpo", "mean_loss", "objective_from", "python_name",
]  # fmt: skip

_HOME = {
    **dict.fromkeys(("Objective", "build_objective", "mean_loss", "objective_from"), "objective"),
    **dict.fromkeys(("Odds", "PairLogps", "PairLosses", "PairScores", "dpo"), "pairwise"),
    "focalpo": "focal",
}


def __getattr__(name: str) -> Any:
    """The functions load with torch, on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that an objective is set by. `check` refuses what cannot train, and returns a warning or None."""

    default: float
    check: Callable[[float], str | None]
    help: str
    stated: bool = False  # a config must say it: its scale is the run's own


Function = str | Callable[..., Any]
"""A function, or `file.function` of this room, which then loads with torch.

It is called with the policy's log-probs, and by keyword with what it names: `reference`, `lengths`, `scores`,
`statistics`, and parameters of the objective.
"""
IMPLICIT, LOGISTIC = "pairwise.implicit", "pairwise.dpo_loss"


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective as the registry holds it: by its `odds`, where it has a Bradley-Terry form, or as a whole `loss`.

    `odds(policy, ...)` is an `Odds`, and a pair's loss is `factor(link(log_odds, *constants)) + beside`:
    `link` (B,), `constants(policy, ...)` a tuple of (B,) that take no gradient, as weights of its own, the `factor` one
    of `factor.FORMS` with the parameter gamma, `beside(policy, ...)` (B,). `loss(policy, ...)` is a `PairLosses`.
    `statistics(policy, reference)` are sums over a pack's pairs, (K,); the functions get their means over all pairs of
    the step, so that how a step is split into packs and over ranks never changes the result.
    """

    parameters: Mapping[str, Parameter]
    odds: Function | None = None
    link: Function = LOGISTIC
    constants: Function | None = None
    factor: str | None = None
    beside: Function | None = None
    loss: Function | None = None
    reference: bool = True  # log-probs of a reference policy
    rejected: bool = True  # log-probs of the rejected answers, and so rewards or margins
    implicit_rewards: bool = True  # beta * (policy - reference) log-probs of whole answers, and nothing else
    lengths: bool = False  # completion tokens of each sequence, (2B,)
    scores: bool = False  # a judge's scores of each pair's answers, `PairScores`
    collisions: bool = False  # log sum_v pi_v^2 of the policy, summed over each answer's tokens, (2B,)
    statistics: Function | None = None

    @property
    def bradley_terry(self) -> bool:
        """Whether pairs have log-odds, and so weights."""
        return self.odds is not None

    @property
    def logistic(self) -> bool:
        """Whether the loss is -log p of its log-odds, before any factor."""
        return self.odds is not None and self.link == LOGISTIC

    @property
    def of_margin(self) -> bool:
        """Whether the log-odds are the margin of the implicit rewards, as in DPO, and alone tell a pair's weight."""
        return self.odds == IMPLICIT and self.constants is None

    @property
    def of_logps(self) -> bool:
        """Whether a pair's loss can be told from its log-probs alone."""
        return not (self.lengths or self.scores or self.collisions or self.statistics)


BETA = Parameter(0.1, bounds.check_beta, "scale of the rewards, per nat; the paper trains with 0.01", stated=True)
SMOOTHING = Parameter(0.1, bounds.check_label_smoothing, "rate of labels taken to be flipped; 0 is DPO")

OBJECTIVES: dict[str, Entry] = {
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
        {"beta": BETA, "alpha": Parameter(0.9, bounds.check_entropy, "of the policy's log-probs; 1 is DPO")},
        odds="logratio.h_dpo",
        implicit_rewards=False,
    ),
    "dpo-shift": Entry(
        {
            "beta": BETA,
            "rejected_factor": Parameter(0.95, bounds.check_rejected_factor, "of rejected rewards; 1 is DPO"),
        },
        odds="logratio.dpo_shift",
        implicit_rewards=False,
    ),
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
    "odpo": Entry(
        {"beta": BETA, "alpha": Parameter(1.0, bounds.check_alpha, "weight of the log score gap; 0 is DPO")},
        odds="odpo.odpo",
        scores=True,
    ),
    "kto": Entry(
        {
            "beta": BETA,
            "desirable_weight": Parameter(1.0, bounds.check_desirable_weight, "weight of chosen answers"),
            "undesirable_weight": Parameter(1.0, bounds.check_undesirable_weight, "weight of rejected answers"),
        },
        loss="kto.kto",
        statistics="kto.logratio_sums",
    ),
    "orpo": Entry(
        {"lambda": Parameter(0.1, bounds.check_lambda, "weight of the odds ratio beside the likelihood")},
        loss="orpo.orpo",
        reference=False,
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
        scores=True,
    ),
    "wpo": Entry(
        {"beta": BETA},
        odds=IMPLICIT,
        link="wpo.weighted",
        constants="wpo.constants",
        lengths=True,
        collisions=True,
    ),
    "sft": Entry({}, loss="sft.sft", reference=False, rejected=False, implicit_rewards=False, lengths=True),
}


def _parameters() -> dict[str, str]:
    """Every parameter's name, with what it means where."""
    helps: dict[str, dict[str, list[str]]] = {}
    for objective, entry in OBJECTIVES.items():
        for name, parameter in entry.parameters.items():
            text = f"{parameter.help} (default {parameter.default:g})"
            helps.setdefault(name, {}).setdefault(text, []).append(objective)
    return {
        name: "; ".join(f"{', '.join(objectives)}: {text}" for text, objectives in texts.items())
        for name, texts in helps.items()
    }


PARAMETERS: dict[str, str] = _parameters()
"""The parameters of all objectives: names as a config has them, with help."""


def python_name(parameter: str) -> str:
    """How a parameter is written in Python: `lambda` is a word of the language there, so `lambda_`."""
    return f"{parameter}_" if iskeyword(parameter) else parameter


def entry_of(name: str) -> Entry:
    """What the registry says of `name`. Raises InputError for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"objective: {name!r} is not known; choose one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
