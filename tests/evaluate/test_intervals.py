"""Intervals by their closed forms and their coverage; the sign test against the binomial's own sum."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.intervals import bootstrap_interval, mean_score, paired_interval, share, sign_test

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (335, 500), (10, 10)])
def test_wilsons_bounds_are_the_roots_of_the_score_equation(right: int, total: int) -> None:
    """A bound p solves (value - p)^2 = z^2 p (1 - p) / n: the definition, not its solution."""
    found = share([True] * right + [False] * (total - right))
    for bound in (found.low, found.high):
        left = (found.value - bound) ** 2
        assert left == pytest.approx(Z**2 * bound * (1 - bound) / total, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_a_share_reads_well() -> None:
    found = share([True] * 81 + [False] * 182)
    assert str(found) == "30.8% [25.5, 36.6]"
    assert str(found.percent) == "30.80 [25.53, 36.62]"
    assert found.percent.standard_error == pytest.approx(100 * math.sqrt(81 / 263 * 182 / 263 / 263))
    with pytest.raises(InputError, match="at least one"):
        share([])


def test_the_paired_interval_has_its_closed_form() -> None:
    """Bonett and Price (2012): with one gain and one loss added, an ordinary interval for a mean of -1, 0 and 1."""
    before = [False] * 40 + [True] * 60
    after = [False] * 20 + [True] * 20 + [False] * 5 + [True] * 55
    changes = np.asarray([a - b for b, a in zip(before, after, strict=True)] + [1, -1], dtype=np.float64)
    difference, low, high = paired_interval(before, after)
    spread = Z * changes.std() / math.sqrt(len(changes))
    assert difference == 0.15
    assert low == pytest.approx(changes.mean() - spread, abs=1e-12)
    assert high == pytest.approx(changes.mean() + spread, abs=1e-12)


def test_the_paired_interval_covers_the_truth_about_95_times_in_a_hundred() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        before = [rng.random() < 0.5 for _ in range(200)]
        after = [was if rng.random() < 0.6 else rng.random() < 0.7 for was in before]  # 0.4 x (0.7 - 0.5) = 0.08
        _, low, high = paired_interval(before, after)
        covered += low <= 0.08 <= high
    assert 930 <= covered <= 970


def test_the_paired_interval_is_symmetric_and_never_empty() -> None:
    before, after = [True, False, True, True], [False, False, True, False]
    difference, low, high = paired_interval(before, after)
    assert paired_interval(after, before) == pytest.approx((-difference, -high, -low))
    same, low, high = paired_interval(before, before)
    assert same == 0
    assert low < 0 < high
    with pytest.raises(InputError, match="same prompts twice"):
        paired_interval([True], [])


def test_the_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    low, high = bootstrap_interval(values.tolist())
    spread = Z * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)


def test_the_bootstrap_of_verdicts_is_the_binomials_quantiles() -> None:
    """Resampled verdicts have a binomial number of right ones: its 2.5% and 97.5% quantiles, by the sum itself."""
    right, total = 30, 100
    terms = [math.comb(total, k) * 0.3**k * 0.7 ** (total - k) for k in range(total + 1)]
    below = np.cumsum(terms)
    expected = [int(np.searchsorted(below, share_)) / total for share_ in (0.025, 0.975)]
    assert bootstrap_interval([1.0] * right + [0.0] * (total - right)) == pytest.approx(expected, abs=0.011)


def test_the_bootstrap_covers_the_truth_about_95_times_in_a_hundred() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, size=100).round(1).tolist(), resamples=400, seed=seed)
        covered += low <= 1.0 <= high
    assert 360 <= covered <= 392


def test_the_bootstrap_is_seeded_and_does_not_see_the_order() -> None:
    values = np.random.default_rng(3).normal(size=50).tolist()
    found = bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values[::-1], seed=4) == found
    assert bootstrap_interval(values, seed=5) != found
    scaled = bootstrap_interval([3 * value + 1 for value in values], seed=4)
    assert scaled == pytest.approx([3 * bound + 1 for bound in found])
    assert bootstrap_interval([2.5] * 7) == (2.5, 2.5)
    for values, message in (([], "at least one"), ([math.nan], "finite")):
        with pytest.raises(InputError, match=message):
            bootstrap_interval(values)
    with pytest.raises(InputError, match="resamples"):
        bootstrap_interval([1.0], resamples=10)


def test_a_mean_has_its_standard_error() -> None:
    values = [0.0, 1.0, 4.0]
    score = mean_score(values)
    assert score.value == pytest.approx(5 / 3)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert mean_score([2.0]).standard_error is None


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 7), (10, 10), (60, 41)])
def test_the_sign_test_is_the_binomials_two_tails(gained: int, lost: int) -> None:
    """The definition: of all ways that the coins may fall, the share that is no more even than this one."""
    changed = gained + lost
    uneven = abs(gained - lost)
    ways = sum(math.comb(changed, k) for k in range(changed + 1) if abs(2 * k - changed) >= uneven)
    assert sign_test(gained, lost) == pytest.approx(ways / 2**changed, rel=1e-12)
    assert sign_test(gained, lost) == sign_test(lost, gained)
    assert sign_test(3000, 1000) < 1e-100
