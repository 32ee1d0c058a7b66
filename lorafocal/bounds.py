"""Which values of an objective's parameters and of adapter dropout make sense, checked without importing torch.

FocalPO (Eq. 4) is L(z) = -p^gamma log p with p = sigmoid(z) and z = beta * (chosen - rejected logratio).
Its slope,

    dL/dz = -(1 - p) p^gamma (1 + gamma log p),

changes sign where log p < -1/gamma: past that margin a step pushes the pair the wrong way. A run starts at
margin 0, where log p = -ln 2, so from gamma = 1/ln 2 on the very first step has no slope or the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard

from lorafocal.errors import InputError

Check = Callable[[float], str | None]
"""Raises InputError for a value that cannot train; returns a warning or None."""

GAMMA_LIMIT = 1 / math.log(2)
"""1.4427: from here on the gradient at margin 0, where every run starts, is zero or points backwards."""

GAMMA_CAUTION = 0.2
"""Above this the turning point is nearer than a margin of about -5, which real pairs reach."""


def finite(name: str, usual: str) -> Check:
    """A check that `name` is a finite number; refusals end with `usual`, such as published values."""
    return _check(name, lambda _: True, "a finite number", usual)


def at_least_zero(name: str, usual: str) -> Check:
    """A check that `name` is a finite number, 0 or more."""
    return _check(name, lambda value: value >= 0, "a finite number, 0 or more", usual)


def above_zero(name: str, usual: str) -> Check:
    """A check that `name` is a finite number above 0."""
    return _check(name, lambda value: value > 0, "a finite number above 0", usual)


def between(
    name: str, low: float, high: float, usual: str, *, above_low: bool = False, below_high: bool = False
) -> Check:
    """A check that `name` is from `low` to `high`, or strictly `above_low` and `below_high`."""

    def holds(value: float) -> bool:
        return (low < value if above_low else low <= value) and (value < high if below_high else value <= high)

    start = f"above {low:g}" if above_low else f"from {low:g}"
    end = f"below {high:g}" if below_high else f"{high:g}"
    return _check(name, holds, f"a finite number {start} to {end}", usual)


def check_beta(beta: float) -> None:
    """Raise `InputError` unless `beta` (scale of the rewards, per nat) is a finite number above 0."""
    if not is_number(beta) or not beta > 0:
        raise InputError(
            f"beta is {beta!r}; it must be a finite number above 0 (published runs use 0.01 to 0.3): "
            "it scales every reward, and at 0 nothing is learned"
        )


def check_gamma(gamma: float) -> str | None:
    """Check FocalPO's exponent (no unit) and return a warning for values that are legal but risky, else None.

    Raises `InputError` where gamma is negative or not finite, and from 1/ln 2 = 1.4427 on.
    """
    if not is_number(gamma) or gamma < 0:
        raise InputError(f"gamma is {gamma!r}; it must be a finite number, 0 (no factor) or more; the paper uses 0.05")
    if gamma >= GAMMA_LIMIT:
        raise InputError(
            f"gamma is {gamma!r}; from 1/ln 2 = {GAMMA_LIMIT:.4f} on the first step, taken at margin 0, "
            "learns nothing or learns backwards; the paper uses 0.05, and up to 0.2 is safe"
        )
    if gamma > GAMMA_CAUTION:
        return (
            f"gamma is {gamma}: pairs whose log p falls below -1/gamma = {-1 / gamma:.3g} are pushed "
            "the wrong way; watch focal/turned_share, or use at most 0.2 (the paper uses 0.05)"
        )
    return None


def check_hard_gamma(gamma: float) -> None:
    """Check the exponent of 1 - p, the hard emphasis: no gamma from 0 on turns a gradient round."""
    at_least_zero("gamma", "0 is DPO; the paper's Figure 1 has 1")(gamma)


def check_detached_gamma(gamma: float) -> None:
    """Check the exponent of a p^gamma that is not differentiated: as a mere weight it turns no gradient round."""
    at_least_zero("gamma", "0 is no factor; FocalPO's own, which is differentiated, has 0.05")(gamma)


def check_gamma_of_eq3(gamma: float) -> None:
    """Check the exponent of Eq. 3's (1-p)^-gamma: above 1 the loss of well ranked pairs grows without bound."""
    if not is_number(gamma) or not 0 <= gamma <= 1:
        raise InputError(
            f"gamma is {gamma!r}; it must be a finite number from 0 (no factor) to 1: above, (1-p)^-gamma grows faster"
            " than the loss of a well ranked pair falls, and it is pushed back; the paper uses 0.05"
        )


def check_dropout(dropout: float, *, allowed: bool) -> None:
    """Raise `InputError` unless the adapters' dropout (probability) is 0 or deliberately allowed."""
    if dropout > 0 and not allowed:
        raise InputError(
            f"dropout is {dropout}, which makes policy and reference differ by noise at every step; "
            "use 0.0, or set allow_dropout to true to accept that"
        )


def _check(name: str, holds: Callable[[float], bool], wanted: str, usual: str) -> Check:
    def check(value: float) -> None:
        if not is_number(value) or not holds(value):
            raise InputError(f"{name} is {value!r}; it must be {wanted}; {usual}")

    return check


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
