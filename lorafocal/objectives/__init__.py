"""Objectives as pure functions of log-probabilities, and the registry that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lorafocal.bounds import check_beta, check_gamma
from lorafocal.errors import InputError
from lorafocal.objectives.focal import focalpo, identity_loss
from lorafocal.objectives.pairwise import PairLogps, PairLosses, dpo

__all__ = ["OBJECTIVES", "Objective", "PairLogps", "PairLosses", "build_objective", "dpo", "focalpo"]


@dataclass(frozen=True, slots=True)
class Objective:
    """A chosen objective with its parameters bound."""

    name: str
    loss: Callable[[PairLogps, PairLogps], PairLosses]
    beta: float
    gamma: float  # FocalPO's exponent; 0 for DPO
    identity_loss: float  # the loss where policy and reference agree

    def __call__(self, policy: PairLogps, reference: PairLogps) -> PairLosses:
        return self.loss(policy, reference)


def _focalpo(beta: float, gamma: float) -> Objective:
    return Objective("focalpo", partial(focalpo, beta=beta, gamma=gamma), beta, gamma, identity_loss(gamma))


def _dpo(beta: float, gamma: float) -> Objective:
    return Objective("dpo", partial(dpo, beta=beta), beta, 0.0, identity_loss(0.0))


OBJECTIVES: dict[str, Callable[[float, float], Objective]] = {"focalpo": _focalpo, "dpo": _dpo}


def build_objective(name: str, *, beta: float, gamma: float) -> Objective:
    """The objective `name` with its parameters checked.

    Raises InputError for an unknown name, beta <= 0, or a gamma that learns backwards from the first step.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective: {name!r} is not known; choose one of {', '.join(sorted(OBJECTIVES))}")
    check_beta(beta)
    if name == "focalpo":
        check_gamma(gamma)
    return OBJECTIVES[name](beta, gamma)


def mean_loss(losses: Tensor, num_pairs: int) -> Tensor:
    """Sum over a pack's pairs divided by the pairs of the whole optimiser step (never a mean of means)."""
    return losses.sum() / num_pairs
