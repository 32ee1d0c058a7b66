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
    from torch import Tensor

    from lorafocal.objectives.focal import focalpo
    from lorafocal.objectives.objective import Objective, build_objective, mean_loss
    from lorafocal.objectives.pairwise import PairLogps, PairLosses, PairScores, dpo

__all__ = [
    "BETA", "OBJECTIVES", "PARAMETERS", "Entry", "Objective", "PairLogps", "PairLosses", "PairScores", "Parameter",
    "build_objective", "dpo", "entry_of", "focalpo", "mean_loss", "python_name",
]  # fmt: skip

_HOME = {
    **dict.fromkeys(("Objective", "build_objective", "mean_loss"), "objective"),
    **dict.fromkeys(("PairLogps", "PairLosses", "PairScores", "dpo"), "pairwise"),
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


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective as the registry holds it.

    `loss` and `statistics` are functions, or name one as `file.function` of this room, which then loads with torch.
    `loss` is called with the policy's log-probs, with what the objective needs by the names below, and with its
    parameters, all by keyword but the first.
    `statistics(policy, reference)` are sums over a pack's pairs, (K,); `loss` gets their means over all pairs of the
    step, so that how a step is split into packs and over ranks never changes the result.
    """

    loss: str | Callable[..., PairLosses]
    parameters: Mapping[str, Parameter]
    reference: bool = True  # log-probs of a reference policy
    rejected: bool = True  # log-probs of the rejected answers, and so rewards or margins
    of_margin: bool = True  # a pair's loss depends on its margin alone, and on its scores
    lengths: bool = False  # completion tokens of each sequence, (2B,)
    scores: bool = False  # a judge's scores of each pair's answers, `PairScores`
    statistics: str | Callable[..., Tensor] | None = None


BETA = Parameter(0.1, bounds.check_beta, "scale of the rewards, per nat; the paper trains with 0.01", stated=True)

OBJECTIVES: dict[str, Entry] = {
    "focalpo": Entry(
        "focal.focalpo",
        {"beta": BETA, "gamma": Parameter(0.05, bounds.check_gamma, "FocalPO's exponent; 0 is DPO")},
    ),
    "dpo": Entry("pairwise.dpo", {"beta": BETA}),
    "focal-hard": Entry(
        "focal.focal_hard",
        {"beta": BETA, "gamma": Parameter(1.0, bounds.check_hard_gamma, "exponent of 1 - p; 0 is DPO")},
    ),
    "odpo": Entry(
        "odpo.odpo",
        {"beta": BETA, "alpha": Parameter(1.0, bounds.check_alpha, "weight of the log score gap; 0 is DPO")},
        scores=True,
    ),
    "kto": Entry(
        "kto.kto",
        {
            "beta": BETA,
            "desirable_weight": Parameter(1.0, bounds.check_desirable_weight, "weight of chosen answers"),
            "undesirable_weight": Parameter(1.0, bounds.check_undesirable_weight, "weight of rejected answers"),
        },
        of_margin=False,
        statistics="kto.logratio_sums",
    ),
    "orpo": Entry(
        "orpo.orpo",
        {"lambda": Parameter(0.1, bounds.check_lambda, "weight of the odds ratio beside the likelihood")},
        reference=False,
        of_margin=False,
        lengths=True,
    ),
    "simpo": Entry(
        "simpo.simpo",
        {
            "beta": Parameter(2.0, bounds.check_beta, "scale of the mean log-probs; 2 to 10", stated=True),
            "gamma_beta_ratio": Parameter(0.5, bounds.check_gamma_beta_ratio, "target margin over beta, nats a token"),
        },
        reference=False,
        lengths=True,
    ),
    "sft": Entry("sft.sft", {}, reference=False, rejected=False, of_margin=False, lengths=True),
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
