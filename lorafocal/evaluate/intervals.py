"""Intervals for a share, for a mean, and for a change over the same prompts; and the sign test of a change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lorafocal.errors import InputError
from lorafocal.evaluate.result import Score

Z_95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000
DRAWN_AT_A_TIME = 2**22  # values held in memory while resampling: 64 MiB with their indices


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `total` with its 95% interval; reads well in an f-string: `67.2% [63.0, 71.2]`."""

    value: float
    low: float
    high: float
    total: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def percent(self) -> Score:
        """The share as a result's score."""
        error = math.sqrt(self.value * (1 - self.value) / self.total)
        return Score(100 * self.value, 100 * self.low, 100 * self.high, 100 * error)


def share(verdicts: Sequence[bool]) -> Share:
    """A share with Wilson's 95% score interval (1927), which also holds near 0 and 1."""
    total = len(verdicts)
    if not total:
        raise InputError("a share of nothing has no value: give at least one verdict")
    value = sum(verdicts) / total
    centre = (value + Z_95**2 / (2 * total)) / (1 + Z_95**2 / total)
    spread = Z_95 / (1 + Z_95**2 / total) * math.sqrt(value * (1 - value) / total + Z_95**2 / (4 * total**2))
    low = max(0.0, centre - spread) if value > 0 else 0.0  # exactly, where rounding would leave 1e-17
    high = min(1.0, centre + spread) if value < 1 else 1.0
    return Share(value, low, high, total)


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """`(difference, low, high)` of the share `after` minus the share `before` on the same prompts, 95%.

    Bonett and Price's adjusted Wald interval for paired shares (2012): one prompt is added to each kind of
    change, after which the difference of changed prompts is normal enough even for few of them. Pairing by
    prompt removes the spread between easy and hard prompts, which two separate intervals would count twice.
    """
    if len(before) != len(after) or not before:
        raise InputError(f"a paired comparison needs the same prompts twice, not {len(before)} and {len(after)}")
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    total = len(before)
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    spread = Z_95 * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return (gained - lost) / total, max(-1.0, up - down - spread), min(1.0, up - down + spread)


def mean_score(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """The mean of `values` with its bootstrap interval and its standard error (of the sample's own spread)."""
    low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
    known = np.asarray(values, dtype=np.float64)
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return Score(float(known.mean()), low, high, error)


def bootstrap_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval (Efron 1979) of the mean of `values`, which need not be ordered.

    The values of one call are the units that are drawn: for a paired comparison give the differences by prompt.
    The same values and seed give the same interval, in whatever order the values come.
    """
    known = np.asarray(values, dtype=np.float64)
    if not len(known) or not np.isfinite(known).all():
        raise InputError("a mean needs at least one value, and finite ones")
    if resamples < 100:
        raise InputError(f"resamples is 100 or more, of which 95% intervals are made, not {resamples}")
    means = np.concatenate(list(_resampled_means(np.sort(known), resamples, np.random.default_rng(seed))))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Means of as many values as there are, drawn with replacement."""
    rows = max(1, DRAWN_AT_A_TIME // len(values))
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(values), size=(min(rows, resamples - start), len(values)))
        yield values[drawn].mean(axis=1)


def sign_test(gained: int, lost: int) -> float:
    """The exact two-sided p of `gained` and `lost` under a fair coin; prompts without a change say nothing.

    2 x P(X <= min(gained, lost)) of a binomial with n = gained + lost and 1/2, at most 1; 1 where nothing changed.
    """
    changed, term, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2**changed)
