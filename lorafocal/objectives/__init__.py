"""The registry of objectives: what each one needs, and what it is set by. Imports no torch, so that configs can ask it.

One more objective is a pure function in a file of this room, and an `Entry` in the table of its family in `registry/`.
The config's section, the fields of `FocalPOConfig` and what is refused follow.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from lorafocal.errors import InputError
from lorafocal.objectives.entry import BETA, Entry, Parameter
from lorafocal.objectives.registry import OBJECTIVES

if TYPE_CHECKING:
    from lorafocal.objectives.focal import focalpo
    from lorafocal.objectives.inputs import OtherAnswers, PairInputs, PairLogps, PairScores
    from lorafocal.objectives.objective import Objective, build_objective, mean_loss, objective_from
    from lorafocal.objectives.pairwise import Odds, PairLosses, dpo

__all__ = [
    "BETA", "OBJECTIVES", "PARAMETERS", "Entry", "Objective", "Odds", "OtherAnswers", "PairInputs", "PairLogps",
    "PairLosses", "PairScores", "Parameter",
    "build_objective", "dpo", "entry_of", "focalpo", "mean_loss", "objective_from", "python_name", "unknown",
]  # fmt: skip

_HOME = {
    **dict.fromkeys(("Objective", "build_objective", "mean_loss", "objective_from"), "objective"),
    **dict.fromkeys(("OtherAnswers", "PairInputs", "PairLogps", "PairScores"), "inputs"),
    **dict.fromkeys(("Odds", "PairLosses", "dpo"), "pairwise"),
    "focalpo": "focal",
}


def __getattr__(name: str) -> Any:
    """The functions load with torch, on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


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


def unknown(name: object) -> str:
    """What is said of a name that no objective has."""
    near = get_close_matches(str(name).lower().replace("_", "-"), OBJECTIVES, 3, 0.4)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{name!r} is not known; {meant}`lorafocal objectives` lists all {len(OBJECTIVES)}"


def entry_of(name: str) -> Entry:
    """What the registry says of `name`. Raises InputError for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"objective: {unknown(name)}")
    return OBJECTIVES[name]
