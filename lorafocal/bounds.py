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
from dataclasses import dataclass
from typing import TypeGuard

from lorafocal.errors import InputError

GAMMA_LIMIT = 1 / math.log(2)
"""1.4427: from here on the gradient at margin 0, where every run starts, is zero or points backwards."""

GAMMA_CAUTION = 0.2
"""Above this the turning point is nearer than a margin of about -5, which real pairs reach."""


@dataclass(frozen=True, slots=True)
class Range:
    """A check of one number: it must be `wanted`, of which `usual` says more, such as published values."""

    name: str
    wanted: str
    usual: str
    holds: Callable[[float], bool]

    def __call__(self, value: float) -> None:
        if not is_number(value) or not self.holds(value):
            raise InputError(f"{self.name} is {value!r}; it must be {self}")

    def __str__(self) -> str:
        return f"{self.wanted}; {self.usual}"


def finite(name: str, usual: str) -> Range:
    """`name` is a finite number; `usual` says more, such as published values."""
    return Range(name, "a finite number", usual, lambda _: True)


def at_least_zero(name: str, usual: str) -> Range:
    """`name` is a finite number, 0 or more."""
    return Range(name, "a finite number, 0 or more", usual, lambda value: value >= 0)


def above_zero(name: str, usual: str) -> Range:
    """`name` is a finite number above 0."""
    return Range(name, "a finite number above 0", usual, lambda value: value > 0)


def between(
    name: str, low: float, high: float, usual: str, *, above_low: bool = False, below_high: bool = False
) -> Range:
    """`name` is from `low` to `high`, or strictly `above_low` and `below_high`."""

    def holds(value: float) -> bool:
        return (low < value if above_low else low <= value) and (value < high if below_high else value <= high)

    start = f"above {low:g}" if above_low else f"from {low:g}"
    end = f"below {high:g}" if below_high else f"{high:g}"
    return Range(name, f"a finite number {start} to {end}", usual, holds)


check_beta = above_zero(
    "beta",
    "it scales every reward, and at 0 nothing is learned; published runs have 0.01 to 0.3 on whole answers, 2 to 10 on"
    " means a token",
)
check_hard_gamma = at_least_zero("gamma", "0 is DPO; the paper's Figure 1 has 1")
"""Of 1 - p, the hard emphasis: no exponent from 0 on turns a gradient round."""
check_detached_gamma = at_least_zero("gamma", "0 is no factor; FocalPO's own, which is differentiated, has 0.05")
"""Of a p^gamma that is not differentiated: as a mere weight it turns no gradient round."""
check_gamma_of_eq3 = between(
    "gamma",
    0,
    1,
    "0 is no factor; above 1, (1-p)^-gamma grows faster than the loss of a well ranked pair falls, and it is pushed"
    " back; the paper uses 0.05",
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


def check_dropout(dropout: float, *, allowed: bool) -> None:
    """Raise `InputError` unless the adapters' dropout (probability) is 0 or deliberately allowed."""
    if dropout > 0 and not allowed:
        raise InputError(
            f"dropout is {dropout}, which makes policy and reference differ by noise at every step; "
            "use 0.0, or set allow_dropout to true to accept that"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
