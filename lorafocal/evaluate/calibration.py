"""Whether p, the probability that a model gives to the preferred answer, is right as often as it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafocal.errors import InputError

BINS = 10
SIMULATIONS = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose confidence lies in [low, high]: its mean, and the mean agreement of the labels with it."""

    low: float
    high: float
    pairs: int
    confidence: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of B pairs; `error` is the expected calibration error over `bins`, in [0, 1] (Naeini et al. 2015).

    `brier` of p against the labels (a coin has 0.25), `log_loss` in nats (a coin has ln 2 = 0.693), pair by pair.
    `chance_errors` are the errors that labels drawn from these very probabilities leave, which only many pairs make
    small: what a perfectly calibrated model would show here. None where labels are shares rather than verdicts.
    """

    bins: tuple[Bin, ...]
    error: float
    brier: tuple[float, ...]
    log_loss: tuple[float, ...]
    chance_errors: tuple[float, ...] | None

    def reliability(self) -> list[dict[str, Any]]:
        """The bins as rows of a table."""
        return [asdict(each) for each in self.bins]


def calibrate(
    margins: Sequence[float], labels: Sequence[float] | None = None, *, bins: int = BINS, seed: int = 0
) -> Calibration:
    """Compare p = sigmoid(margin), Bradley and Terry's probability that the chosen answer wins, with the labels.

    `labels` are the shares of annotators, in [0, 1], that prefer the chosen answer; 1 for each pair where None. A pair
    counts on the side that the model prefers: its confidence is max(p, 1 - p), its agreement the share of labels on
    that side (half of a pair at margin 0), so that the order of the answers in the file cannot matter. Bins hold about
    equally many pairs, as the small margins of a small beta would all fall into one bin of equal width; equal
    confidences are never parted.
    """
    if bins < 1:
        raise InputError(f"bins is 1 or more, not {bins}")
    margin = np.asarray(margins, dtype=np.float64)
    label = np.ones_like(margin) if labels is None else np.asarray(labels, dtype=np.float64)
    if not len(margin) or margin.shape != label.shape:
        raise InputError(f"calibration needs a label for each margin, and at least one, not {len(label)}")
    if not np.isfinite(margin).all() or not ((label >= 0) & (label <= 1)).all():
        raise InputError("calibration needs finite margins, and labels in [0, 1]")
    confidence = _sigmoid(np.abs(margin))
    agreement = np.where(margin == 0, 0.5, np.where(margin > 0, label, 1 - label))
    table = _reliability(confidence, agreement, bins)
    chance = _chance_errors(confidence, bins, seed) if np.isin(label, (0, 1)).all() else None
    return Calibration(
        bins=table,
        error=_error(table),
        brier=tuple(((_sigmoid(margin) - label) ** 2).tolist()),
        log_loss=tuple((label * np.logaddexp(0, -margin) + (1 - label) * np.logaddexp(0, margin)).tolist()),
        chance_errors=None if chance is None else tuple(chance.tolist()),
    )


def _reliability(confidence: Floats, agreement: Floats, bins: int) -> tuple[Bin, ...]:
    index = _bin_index(confidence, bins)
    rows = [index == number for number in np.unique(index)]
    return tuple(
        Bin(
            low=float(confidence[row].min()),
            high=float(confidence[row].max()),
            pairs=int(row.sum()),
            confidence=float(confidence[row].mean()),
            agreement=float(agreement[row].mean()),
        )
        for row in rows
    )


def _bin_index(confidence: Floats, bins: int) -> NDArray[np.intp]:
    """Which bin each pair is in: edges at quantiles, so equal values share a bin."""
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    return np.searchsorted(np.unique(edges), confidence, side="left")


def _error(table: Sequence[Bin]) -> float:
    total = sum(each.pairs for each in table)
    return sum(each.pairs * abs(each.confidence - each.agreement) for each in table) / total


def _chance_errors(confidence: Floats, bins: int, seed: int) -> Floats:
    """The calibration errors, (SIMULATIONS,), of labels drawn from the confidences themselves."""
    index, rng = _bin_index(confidence, bins), np.random.default_rng(seed)
    member = np.eye(int(index.max()) + 1)[index]
    gaps = [(rng.random(len(confidence)) < confidence) - confidence for _ in range(SIMULATIONS)]
    return np.asarray([np.abs(gap @ member).sum() / len(confidence) for gap in gaps])


def _sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -values))
