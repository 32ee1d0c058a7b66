"""Bradley-Terry strengths by logistic regression: how likely each player beats each other one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lorafocal.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = 1e-8  # of the gradient, a battle: win rates are exact to about this


def strengths(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-odds strengths (P,) of P players, the first one's being 0: the most likely ones given who won.

    `wins[i, j]` is how often i beat j, any finite weight >= 0; a tie is half a win for each. Player i beats j with
    probability sigmoid(strengths[i] - strengths[j]) (Bradley & Terry 1952; Hunter 2004, section 2), fitted without a
    penalty by scikit-learn's LogisticRegression. Somebody who never lost (or never won) has no finite strength: the
    fit ends where the probability is 1 (or 0) within about `TOLERANCE`.

    Raises InputError where some players never met, not even through others, or scikit-learn is not installed.
    """
    count = len(wins)
    if wins.shape != (count, count) or not np.isfinite(wins).all() or (wins < 0).any():
        raise InputError(f"wins is a square table of finite numbers of at least 0, not of shape {wins.shape}")
    if not _all_met(wins):
        raise InputError("these players were never all compared, so their strengths have no common scale")
    first, second = np.triu_indices(count, k=1)
    sides = np.zeros((len(first), count))
    rows = np.arange(len(first))
    sides[rows, first], sides[rows, second] = 1.0, -1.0
    regression = library().LogisticRegression(C=np.inf, fit_intercept=False, tol=TOLERANCE, max_iter=1000)
    regression.fit(
        np.concatenate((sides, sides))[:, 1:],  # without its column the first player stays at 0
        np.repeat([1, 0], len(rows)),
        sample_weight=np.concatenate((wins[first, second], wins[second, first])),
    )
    return np.concatenate(([0.0], regression.coef_[0]))


def library() -> ModuleType:
    """scikit-learn's linear models. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("sklearn.linear_model")
    except ImportError as error:
        raise InputError("Bradley-Terry win rates need scikit-learn: pip install 'lorafocal[eval]'") from error


def win_probability(advantage: float) -> float:
    """That of a player whose strength exceeds the other's by `advantage`."""
    return float(1.0 / (1.0 + np.exp(-advantage)))


def _all_met(wins: NDArray[np.float64]) -> bool:
    """Whether the battles connect all players."""
    met = (wins + wins.T > 0) | np.eye(len(wins), dtype=bool)
    for _ in wins:
        met = met @ met
    return bool(met.all())
