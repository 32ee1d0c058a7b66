"""Fused margins against BeeS's printed equation, in decimals of 45 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest

from lorafocal.data.steps.fuse import fused, upper
from lorafocal.errors import InputError

BOUNDS = {"score_gap": (-2.0, 4.0), "margin": (-2.0, 1.5)}
COLUMNS = {"score_gap": [-1.5, 0.0, 3.75, 1.0], "margin": [1.25, 0.0, -1.75, -0.5]}


def probability(row: int) -> Decimal:
    """Eq. 3 of arXiv:2502.14560: the product over the sources, over itself and the product of the complements."""
    right = wrong = Decimal(1)
    for name, values in COLUMNS.items():
        low, high = map(Decimal, BOUNDS[name])
        share = (min(max(Decimal(values[row]), low), high) - low) / (high - low)
        right, wrong = right * share, wrong * (1 - share)
    return right / (right + wrong)


@pytest.mark.parametrize("row", range(4))
def test_the_log_odds_are_those_of_the_equation(row: int) -> None:
    with localcontext() as context:
        context.prec = 45
        expected = float((probability(row) / (1 - probability(row))).ln())
    assert fused(COLUMNS, BOUNDS, "data.steps.0.select")[row] == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_beyond_the_bounds_the_other_source_still_ranks() -> None:
    columns = {"score_gap": [1e9, 1e300, 1e9], "margin": [0.0, 0.5, 1.0]}
    odds = fused(columns, BOUNDS, "data.steps.0.select")
    assert odds == sorted(odds)
    assert len({*odds}) == 3


def test_one_source_for_and_one_against_are_a_draw() -> None:
    columns = {"score_gap": [1e9], "margin": [-1e9]}
    assert fused(columns, BOUNDS, "data.steps.0.select")[0] == pytest.approx(0, abs=1e-9)


def test_the_upper_bound_leaves_a_tail_of_thirty() -> None:
    """2/3 of the largest external margin, then by 1 as long as 30 pairs lie beyond."""
    values = [float(value) for value in range(12) for _ in range(10)]  # 0 to 11, ten each
    assert upper(values, external=True) == 10.0  # 7: 50, 8: 40, 9: 30, 10: 20 pairs
    assert upper(values, external=False) == 10.0
    assert upper([0.1, 0.9], external=True) == 0.0


def test_margins_below_the_lower_bound_need_bounds() -> None:
    columns = {"score_gap": [-9.0, -8.0], "margin": [0.0, 1.0]}
    with pytest.raises(InputError, match=r"data\.steps\.0\.select\.bounds: all of score_gap is below -2"):
        fused(columns, {}, "data.steps.0.select")
