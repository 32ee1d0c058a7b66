"""Correlations against scipy's, and intervals against the closed form and by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lorafocal.errors import InputError
from lorafocal.evaluate.correlation import mean_ranks, pearson, spearman, spread_ratio, with_interval


def correlated(count: int, rho: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return one, rho * one + math.sqrt(1 - rho**2) * other


def test_both_correlations_are_scipys_ties_included() -> None:
    one, other = correlated(80, 0.6, seed=1)
    tied = (one * 2).round(), (other * 2).round()
    assert len(set(tied[0].tolist())) < 20, "ties"
    for first, second in ((one, other), tied):
        assert float(pearson(first, second)) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
        assert float(spearman(first, second)) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
        assert float(spread_ratio(first, second)) == pytest.approx(float(first.std() / second.std()), abs=1e-12)
        assert (mean_ranks(first) + 0.5).tolist() == stats.rankdata(first).tolist()


def test_rows_are_statistics_of_their_own() -> None:
    one, other = correlated(60, 0.3, seed=2)
    batch = spearman(one.reshape(3, 20), other.reshape(3, 20))
    apart = [stats.spearmanr(one[n : n + 20], other[n : n + 20]).statistic for n in (0, 20, 40)]
    assert batch.tolist() == pytest.approx(apart, abs=1e-12)


def test_a_scale_and_a_shift_change_nothing() -> None:
    one, other = (side.tolist() for side in correlated(50, 0.5, seed=3))
    scaled = [0.01 * value + 7 for value in one]
    for statistic in (pearson, spearman):
        plain, moved = with_interval(statistic, one, other), with_interval(statistic, scaled, other)
        assert (plain.value, plain.low, plain.high) == pytest.approx((moved.value, moved.low, moved.high), abs=1e-9)


def test_of_normal_pairs_the_interval_is_fishers() -> None:
    one, other = (side.tolist() for side in correlated(400, 0.7, seed=4))
    score = with_interval(pearson, one, other)
    middle, spread = math.atanh(score.value), 1.96 / math.sqrt(397)
    assert score.low == pytest.approx(math.tanh(middle - spread), abs=0.02)
    assert score.high == pytest.approx(math.tanh(middle + spread), abs=0.02)


@pytest.mark.parametrize("statistic", [pearson, spearman])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(statistic) -> None:
    rho = 0.6
    truth = rho if statistic is pearson else 6 / math.pi * math.asin(rho / 2)  # of normal pairs
    scores = [
        with_interval(statistic, *(side.tolist() for side in correlated(100, rho, seed)), resamples=200, seed=seed)
        for seed in range(100)
    ]
    held = sum(score.low <= truth <= score.high for score in scores)
    assert 87 <= held <= 99


def test_the_same_seed_gives_the_same_interval_in_pieces_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (side.tolist() for side in correlated(64, 0.2, seed=5))
    whole = with_interval(pearson, one, other)
    assert whole == with_interval(pearson, one, other)
    assert whole != with_interval(pearson, one, other, seed=1)
    monkeypatch.setattr("lorafocal.evaluate.correlation.AT_A_TIME", 64 * 100)
    assert whole == with_interval(pearson, one, other)


@pytest.mark.parametrize(("one", "other"), [([1.0, 1.0], [1.0, 2.0]), ([1.0], [2.0]), ([math.inf, 1.0], [1.0, 2.0])])
def test_what_does_not_vary_or_is_no_number_is_refused(one: list[float], other: list[float]) -> None:
    with pytest.raises(InputError, match="two finite numbers or more that are not all alike"):
        with_interval(pearson, one, other)
