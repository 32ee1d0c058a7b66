"""Calibration where its numbers are known: drawn labels, a coin, a model that is surer than it is right."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.calibration import calibrate


def oriented(count: int, *, seed: int = 0) -> list[float]:
    """Margins of pairs whose chosen side was drawn with probability sigmoid(margin of the first side)."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=count) * 2
    return np.where(rng.random(count) < 1 / (1 + np.exp(-first)), first, -first).tolist()


def test_labels_drawn_by_p_are_calibrated_and_a_factor_on_the_margins_is_not() -> None:
    margins = oriented(4000)
    honest = calibrate(margins)
    assert honest.chance_errors is not None
    assert honest.error < np.quantile(honest.chance_errors, 0.99)
    sure = calibrate([3 * margin for margin in margins])
    shy = calibrate([margin / 3 for margin in margins])
    for wrong in (sure, shy):
        assert wrong.chance_errors is not None
        assert wrong.error > 2 * max(wrong.chance_errors)
        assert np.mean(wrong.log_loss) > np.mean(honest.log_loss)
    assert sure.bins[-1].confidence > sure.bins[-1].agreement
    assert shy.bins[-1].confidence < shy.bins[-1].agreement


def test_a_coin_is_calibrated_and_says_nothing() -> None:
    found = calibrate([0.0] * 9)
    assert found.error == 0
    assert found.brier == (0.25,) * 9
    assert found.log_loss == pytest.approx((math.log(2),) * 9)
    assert [(each.pairs, each.confidence, each.agreement) for each in found.bins] == [(9, 0.5, 0.5)]


def test_the_numbers_are_their_definitions() -> None:
    margins, labels = [2.0, -1.0, 0.5, -3.0], [0.9, 0.4, 0.2, 1.0]
    p = [1 / (1 + math.exp(-margin)) for margin in margins]
    found = calibrate(margins, labels, bins=1)
    sure = sum(max(q, 1 - q) for q in p) / 4
    agreed = (0.9 + 0.6 + 0.2 + 0.0) / 4
    assert found.error == pytest.approx(abs(sure - agreed))
    assert found.brier == pytest.approx([(q - y) ** 2 for q, y in zip(p, labels, strict=True)])
    losses = [-y * math.log(q) - (1 - y) * math.log(1 - q) for q, y in zip(p, labels, strict=True)]
    assert found.log_loss == pytest.approx(losses)
    assert found.chance_errors is None


def test_neither_the_order_of_pairs_nor_of_their_answers_matters() -> None:
    margins = oriented(300)
    labels = np.random.default_rng(1).random(300).tolist()
    found = calibrate(margins, labels)
    back = calibrate(margins[::-1], labels[::-1])
    turned = calibrate([-margin for margin in margins], [1 - label for label in labels])
    assert back.error == pytest.approx(found.error, abs=1e-12)
    assert turned.error == pytest.approx(found.error, abs=1e-12)
    assert turned.brier == pytest.approx(found.brier, abs=1e-12)
    assert turned.log_loss == pytest.approx(found.log_loss, abs=1e-12)


@pytest.mark.row("58")
def test_bins_hold_about_equally_many_and_never_part_equal_margins() -> None:
    table = calibrate(oriented(1000)).bins
    assert len(table) == 10
    assert [each.pairs for each in table] == [100] * 10
    assert all(a.high <= b.low for a, b in itertools.pairwise(table))
    tied = calibrate([0.1] * 500 + [-0.1] * 300 + [5.0] * 10).bins
    assert [each.pairs for each in tied] == [800, 10]
    assert tied[0].agreement == 0.625


def test_margins_past_floats_of_the_exponential_are_no_trouble() -> None:
    found = calibrate([1e4, -1e4])
    assert found.log_loss == (0.0, 1e4)
    assert found.brier == (0.0, 1.0)


@pytest.mark.parametrize(
    ("margins", "labels", "bins", "message"),
    [
        ([], None, 10, "at least one"),
        ([1.0], [1.0, 0.0], 10, "a label for each"),
        ([math.inf], None, 10, "finite"),
        ([1.0], [1.2], 10, r"labels in \[0, 1\]"),
        ([1.0], [math.nan], 10, r"labels in \[0, 1\]"),
        ([1.0], None, 0, "bins"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    margins: list[float], labels: list[float] | None, bins: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(margins, labels, bins=bins)
