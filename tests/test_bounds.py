"""Bounds of beta, gamma and dropout."""

import math
import re

import pytest

from lorafocal import bounds
from lorafocal.bounds import GAMMA_LIMIT, check_beta, check_dropout, check_gamma
from lorafocal.errors import InputError


def slope_at_start(gamma: float) -> float:
    """dL/dz of FocalPO at margin 0, by central differences in float64."""

    def loss(z: float) -> float:
        log_p = -math.log1p(math.exp(-z))
        return -math.exp(gamma * log_p) * log_p

    return (loss(1e-5) - loss(-1e-5)) / 2e-5


@pytest.mark.row("64")
def test_the_limit_of_gamma_is_where_the_first_step_turns_backwards() -> None:
    assert slope_at_start(GAMMA_LIMIT - 0.01) < 0
    assert slope_at_start(GAMMA_LIMIT + 0.01) > 0
    assert check_gamma(GAMMA_LIMIT - 0.01)
    with pytest.raises(InputError, match="learns backwards"):
        check_gamma(GAMMA_LIMIT)


@pytest.mark.parametrize(("gamma", "warned"), [(0, False), (0.05, False), (0.2, False), (0.21, True), (1.0, True)])
def test_only_large_gammas_are_warned_about(gamma: float, warned: bool) -> None:
    assert (check_gamma(gamma) is not None) == warned


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf, None, True, "0.05"])
def test_gamma_that_is_no_exponent_is_refused(gamma: object) -> None:
    with pytest.raises(InputError, match="gamma is"):
        check_gamma(gamma)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, True, "0.1"])
def test_beta_must_be_a_positive_number(beta: object) -> None:
    check_beta(0.01)
    with pytest.raises(InputError, match="beta is"):
        check_beta(beta)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("check", "takes", "refuses", "wanted"),
    [
        (bounds.finite("tau", "1"), (-1e300, 0, 3), (), "a finite number"),
        (bounds.at_least_zero("tau", "1"), (0, 1e-300, 3), (-1e-300, -1), "a finite number, 0 or more"),
        (bounds.above_zero("tau", "1"), (1e-300, 3), (0, -0.0, -1), "a finite number above 0"),
        (bounds.between("tau", -1, 2, "1"), (-1, 0, 2), (-1.001, 2.001), "a finite number from -1 to 2"),
        (bounds.between("tau", 0, 2, "1", above_low=True), (0.1, 2), (0, 2.1), "a finite number above 0 to 2"),
        (bounds.between("tau", 0, 0.5, "1", below_high=True), (0, 0.4), (-0.1, 0.5), "from 0 to below 0.5"),
    ],
)
def test_a_check_takes_its_range_and_refuses_with_name_value_range_and_usual_values(check, takes, refuses, wanted):
    assert [check(value) for value in takes] == [None] * len(takes)
    for value in (*refuses, math.nan, math.inf, -math.inf, None, True, "1"):
        with pytest.raises(InputError, match=f"tau is {re.escape(repr(value))}; it must be .*{wanted}; 1"):
            check(value)


@pytest.mark.row("14")
def test_dropout_needs_permission() -> None:
    check_dropout(0.0, allowed=False)
    check_dropout(0.1, allowed=True)
    with pytest.raises(InputError, match="allow_dropout"):
        check_dropout(0.1, allowed=False)
