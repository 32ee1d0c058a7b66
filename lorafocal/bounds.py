"""Which values of beta, gamma and adapter dropout make sense, checked without importing torch.

FocalPO (Eq. 4) is L(z) = -p^gamma log p with p = sigmoid(z) and z = beta * (chosen - rejected logratio).
Its slope,

    dL/dz = -(1 - p) p^gamma (1 + gamma log p),

changes sign where log p < -1/gamma: past that margin a step pushes the pair the wrong way. A run starts at
margin 0, where log p = -ln 2, so from gamma = 1/ln 2 on the very first step has no slope or the wrong one.
"""

from __future__ import annotations

import math

from lorafocal.errors import InputError

GAMMA_LIMIT = 1 / math.log(2)
"""1.4427: from here on the gradient at margin 0, where every run starts, is zero or points backwards."""

GAMMA_CAUTION = 0.2
"""Above this the turning point is nearer than a margin of about -5, which real pairs reach."""


def check_beta(beta: float) -> None:
    """Raise `InputError` unless `beta` (scale of the rewards, per nat) is a finite number above 0."""
    if not _is_number(beta) or not beta > 0:
        raise InputError(
            f"beta is {beta!r}; it must be a finite number above 0 (published runs use 0.01 to 0.3): "
            "it scales every reward, and at 0 nothing is learned"
        )


def check_gamma(gamma: float) -> str | None:
    """Check FocalPO's exponent (no unit) and return a warning for values that are legal but risky, else None.

    Raises `InputError` where gamma is negative or not finite, and from 1/ln 2 = 1.4427 on.
    """
    if not _is_number(gamma) or gamma < 0:
        raise InputError(
            f"gamma is {gamma!r}; it must be a finite number, 0 (this is DPO) or more; the paper uses 0.05"
        )
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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
