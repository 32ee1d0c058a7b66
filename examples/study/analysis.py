"""The preregistered analysis: learning rates by validation, paired contrasts on test questions, Holm, equivalence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from design import Study
from table import Prompts, Row

RESAMPLES = 10_000
LEVEL = 0.05
_LEGENDRE = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Right answers of `arm` minus those of `against` in points, paired by seed and question.

    `low` and `high` are Student's 95% interval over seeds; `drawn` the bootstrap's over seeds and questions; `p` is of
    the paired t-test over seeds, `flips` of the exact test that flips the seeds' signs; `adjusted` Holm's p.
    """

    condition: str
    arm: str
    against: str
    rates: tuple[float, float]
    seeds: int
    value: float
    low: float
    high: float
    drawn: tuple[float, float]
    p: float
    flips: float
    adjusted: float | None = None

    def verdict(self, equivalence: float) -> str:
        """In words, by the rule of the preregistration."""
        p = self.p if self.adjusted is None else self.adjusted
        bounds = (self.low, self.high, *self.drawn)
        small = ", and the difference is too small to matter" if all(abs(b) < equivalence for b in bounds) else ""
        if p < LEVEL:
            return f"{'better' if self.value > 0 else 'worse'}{small}"
        return "equivalent" if small else "undecided"


def best_rates(runs: Sequence[Row], study: Study, condition: str) -> dict[str, float]:
    """Each arm's learning rate of the highest mean of right answers on validation questions; the lower at a tie."""
    best = {}
    for arm in study.arms:
        means = {rate: np.mean(values(runs, "validation_right", condition, arm.name, rate)) for rate in study.rates}
        best[arm.name] = max(sorted(means), key=lambda rate: means[rate])
    return best


def values(runs: Sequence[Row], key: str, condition: str, arm: str, rate: float) -> list[float]:
    """One column over the seeds of a cell; what was not measured is left out."""
    found = [row for row in runs if (row["condition"], row["arm"], row["grid_rate"]) == (condition, arm, rate)]
    return [row[key] for row in found if row[key] is not None]


def contrast(
    prompts: Prompts, condition: str, pair: tuple[str, str], rates: Mapping[str, float], *, seed: int = 0
) -> Contrast:
    """Compare two arms at their rates over the seeds that both have."""
    sides = [{key[3]: of for key, of in prompts.items() if key[:3] == (condition, arm, rates[arm])} for arm in pair]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    points = 100 * np.stack([sides[0][one] - sides[1][one] for one in seeds])  # (seeds, questions)
    means = points.mean(axis=1)
    value, low, high = student_interval(means)
    return Contrast(
        condition, *pair, (rates[pair[0]], rates[pair[1]]), len(seeds), value, low, high,
        bootstrap(points, seed=seed), paired_p(means), sign_flips(means),
    )  # fmt: skip


def student_interval(means: np.ndarray) -> tuple[float, float, float]:
    """The mean of the seeds' values with its 95% interval."""
    value, spread = float(means.mean()), student_quantile(1 - LEVEL / 2, len(means) - 1) * _error(means)
    return value, value - spread, value + spread


def paired_p(means: np.ndarray) -> float:
    """The two-sided p of the t-test that the seeds' differences have mean 0."""
    error = _error(means)
    return two_sided_p(float(means.mean()) / error, len(means) - 1) if error > 0 else float(means.mean() == 0)


def _error(means: np.ndarray) -> float:
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def bootstrap(points: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of (seeds, questions), both drawn anew, with replacement, independently.

    A question is drawn for all seeds at once, since all answer the same ones.
    """
    of_seeds, of_questions = _drawn(*points.shape, seed)
    means = ((of_seeds @ points) * of_questions).sum(axis=1)
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


@cache
def _drawn(seeds: int, questions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each seed and each question counts in every resample, rows of shares."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    return of_seeds, rng.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES) / questions


def sign_flips(means: np.ndarray) -> float:
    """The exact two-sided p of a mean difference when each seed's sign is a fair coin."""
    signs = np.asarray(list(itertools.product((1, -1), repeat=len(means))))
    drawn = np.abs(signs @ means)
    return float((drawn >= abs(means.sum()) * (1 - 1e-12)).mean())


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = running
    return adjusted


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t, by t = sqrt(freedom) tan(angle), under which the density is cos^(freedom - 1)."""
    tail = _cosines(math.atan(abs(t) / math.sqrt(freedom)), freedom)
    return tail / _cosines(0.0, freedom)


@cache
def student_quantile(share: float, freedom: int) -> float:
    """The t below which Student's t lies with probability `share` above 1/2, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if two_sided_p(middle, freedom) < 2 * (1 - share) else (middle, high)
    return high


def _cosines(start: float, freedom: int) -> float:
    """The integral of cos^(freedom - 1) from `start` to pi/2, by Gauss and Legendre, exact to rounding."""
    places, weights = _LEGENDRE
    half = (math.pi / 2 - start) / 2
    return float(half * (weights * np.cos(start + half * (places + 1)) ** (freedom - 1)).sum())
