"""FocalPO's numbers to the digits that its derivation printed, by the functions that train."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.objective import Objective
from tests.objectives import oracles

# Three digits differ by one from the notes that they stand in, which had 0.6434, 0.918 and (below) 0.804.
# gamma, peak's log-odds and weight, weight at 0 and over DPO's, turning point, highest loss, loss at 0
GOLDEN = [
    (0.01, -3.892, 0.9055, 0.4931, 0.9862, -100.0, 36.788, 0.688359),
    (0.02, -3.185, 0.8422, 0.4863, 0.9726, -50.0, 18.394, 0.683604),
    (0.05, -2.2384, 0.70984, 0.46623, 0.93246, -20.0000, 7.3576, 0.669536),
    (0.1, -1.511, 0.5723, 0.4342, 0.8684, -9.99995, 3.6788, 0.646729),
    (0.2, -0.776, 0.4181, 0.3749, 0.7499, -4.9932, 1.8394, 0.603420),
    (0.3, -0.346, 0.3308, 0.3217, 0.6433, -3.2970, 1.2263, 0.563010),
    (0.5, 0.194, 0.2340, 0.2310, 0.4620, -1.8546, 0.7358, 0.490129),
    (1.0, 0.919, 0.1354, 0.0767, 0.1534, -0.5413, 0.3679, 0.346574),
]
# Log-odds: weight of gamma 0.05, and over DPO's.
ALONG = [
    (-10, 0.3032, 0.303),
    (-5, 0.5797, 0.584),
    (-3, 0.6932, 0.728),
    (-2, 0.7077, 0.803),
    (-1, 0.6396, 0.875),
    (0, 0.4662, 0.932),
    (1, 0.2606, 0.969),
    (2, 0.1177, 0.987),
    (5, 0.0067, 0.999),
]
DPO = build_objective("dpo", beta=1.0)


def unit(last: float | str) -> float:
    """Half of the last printed digit."""
    decimals = -Decimal(str(last)).as_tuple().exponent
    return 0.5000001 * 10**-decimals


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: str(row[0]))
def test_golden_values_hold_to_the_digits_printed(row: tuple[float, ...]) -> None:
    gamma, peak, highest, at_tie, over_dpo, turn, most, first = row
    focal = build_objective("focalpo", beta=1.0, gamma=gamma)
    z = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    weights, tie = focal.weights(z), torch.zeros(1, dtype=torch.float64)
    assert float(z[weights.argmax()]) == pytest.approx(peak, abs=unit(peak))
    assert float(weights.max()) == pytest.approx(highest, abs=unit(highest))
    assert float(focal.weights(tie)) == pytest.approx(at_tie, abs=unit(at_tie))
    assert float(focal.weights(tie) / DPO.weights(tie)) == pytest.approx(over_dpo, abs=unit(over_dpo))
    assert focal.turning_point == pytest.approx(turn, abs=unit(turn))
    assert float(loss_at(focal, torch.tensor([focal.turning_point]))) == pytest.approx(most, abs=unit(most))
    assert float(loss_at(focal, tie)) == pytest.approx(first, abs=unit(first))
    detached = build_objective("focalpo-detached", beta=1.0, gamma=gamma).weights(z)
    assert float(z[detached.argmax()]) == pytest.approx(math.log(gamma), abs=1e-4)


def loss_at(objective: Objective, log_odds: Tensor) -> Tensor:
    zeros = torch.zeros_like(log_odds, dtype=torch.float64)
    return objective(PairLogps(log_odds.double(), zeros), PairLogps(zeros, zeros)).losses


@pytest.mark.parametrize("gamma", [1.4427, 2.0])
def test_the_two_rows_that_start_backwards_are_refused(gamma: float) -> None:
    weights = {1.4427: 0.0, 2.0: -0.0483}
    assert float(oracles.weight("p_gamma", gamma, 0)) == pytest.approx(weights[gamma], abs=5e-5)
    with pytest.raises(InputError):
        build_objective("focalpo", beta=1.0, gamma=gamma)


def test_golden_values_of_gamma_0_05_along_the_log_odds() -> None:
    z = torch.tensor([row[0] for row in ALONG], dtype=torch.float64)
    weights = build_objective("focalpo", beta=1.0, gamma=0.05).weights(z)
    torch.testing.assert_close(weights.tolist(), [row[1] for row in ALONG], rtol=0, atol=5.0001e-5)
    torch.testing.assert_close((weights / DPO.weights(z)).tolist(), [row[2] for row in ALONG], rtol=0, atol=5.0001e-4)


def test_golden_values_of_equation_3() -> None:
    """Over DPO's weight: 1 for hopeless pairs, and (1 - gamma)(1 - p)^-gamma for solved ones."""
    third = build_objective("focalpo-eq3", beta=1.0, gamma=0.05)
    z = torch.tensor([-30.0, 2, 5, 10], dtype=torch.float64)
    ratios = (third.weights(z) / DPO.weights(z)).tolist()
    assert ratios == pytest.approx([1.0, 1.06, 1.22, 1.57], abs=5e-3)
    far = torch.tensor([20.0], dtype=torch.float64)
    assert float(third.weights(far) / DPO.weights(far)) == pytest.approx(0.95 * math.exp(0.05 * 20), rel=1e-6)
    assert oracles.weight("eq3", 1.5, 8) < 0  # why a gamma above 1 is refused: it turns the best ranked pairs round
    with pytest.raises(InputError):
        build_objective("focalpo-eq3", beta=1.0, gamma=1.5)
