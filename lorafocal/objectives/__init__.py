"""Objectives as pure functions of log-probabilities, and the registry that says what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lorafocal.bounds import check_beta, check_gamma
from lorafocal.errors import InputError
from lorafocal.objectives.focal import focalpo
from lorafocal.objectives.pairwise import PairLogps, PairLosses, dpo
from lorafocal.objectives.sft import sft

__all__ = [
    "OBJECTIVES", "Entry", "Objective", "PairLogps", "PairLosses", "build_objective", "dpo", "entry_of", "focalpo",
    "mean_loss", "sft",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective as the registry holds it.

    `loss` is called with the policy's log-probs, with `reference` and `lengths` where it needs them, and with its
    parameters, all by keyword but the first. Nothing that it does not need is computed.
    """

    loss: Callable[..., PairLosses]
    parameters: Mapping[str, float]  # names, with defaults; `bounds` has a check of each
    reference: bool = True  # log-probs of a reference policy
    rejected: bool = True  # log-probs of the rejected answers, and so rewards or margins
    lengths: bool = False  # completion tokens of each sequence, (2B,)


OBJECTIVES: dict[str, Entry] = {
    "focalpo": Entry(focalpo, {"beta": 0.1, "gamma": 0.05}),
    "dpo": Entry(dpo, {"beta": 0.1}),
    "sft": Entry(sft, {}, reference=False, rejected=False, lengths=True),
}
_CHECKS: dict[str, Callable[[float], object]] = {"beta": check_beta, "gamma": check_gamma}


@dataclass(frozen=True, slots=True)
class Objective:
    """A chosen objective with its parameters bound."""

    name: str
    entry: Entry
    parameters: Mapping[str, float]
    loss: Callable[..., PairLosses]

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, lengths: Tensor | None = None
    ) -> PairLosses:
        """Per-pair losses and rewards; what the objective does not need may be left out."""
        inputs: dict[str, object] = {}
        if self.entry.reference:
            inputs["reference"] = reference
        if self.entry.lengths:
            inputs["lengths"] = lengths
        return self.loss(policy, **inputs)

    @property
    def gamma(self) -> float:
        """FocalPO's exponent; 0 for an objective without one, whose weights are DPO's."""
        return self.parameters.get("gamma", 0.0)


def entry_of(name: str) -> Entry:
    """What the registry says of `name`. Raises InputError for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"objective: {name!r} is not known; choose one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]


def build_objective(name: str, *, beta: float | None = None, gamma: float | None = None) -> Objective:
    """The objective `name` with its parameters checked; None is its default, and what it has not is left aside.

    Raises InputError for an unknown name, beta <= 0, or a gamma that learns backwards from the first step.
    """
    entry = entry_of(name)
    given = {key: value for key, value in (("beta", beta), ("gamma", gamma)) if value is not None}
    parameters = {key: given.get(key, default) for key, default in entry.parameters.items()}
    for key, value in parameters.items():
        _CHECKS[key](value)
    return Objective(name, entry, parameters, partial(entry.loss, **parameters))


def mean_loss(losses: Tensor, num_pairs: int) -> Tensor:
    """Sum over a pack's pairs divided by the pairs of the whole optimiser step (never a mean of means)."""
    return losses.sum() / num_pairs
