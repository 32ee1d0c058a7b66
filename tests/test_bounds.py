"""Bounds of beta, gamma and dropout."""

import math

import pytest

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


@pytest.mark.row("14")
def test_dropout_needs_permission() -> None:
    check_dropout(0.0, allowed=False)
    check_dropout(0.1, allowed=True)
    with pytest.raises(InputError, match="allow_dropout"):
        check_dropout(0.1, allowed=False)
