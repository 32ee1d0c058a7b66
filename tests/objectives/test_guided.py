"""MODPO against its printed equation, and where it is DPO."""

from __future__ import annotations

import random
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch

from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.factor import FORMS
from tests.objectives.batch import Batch, close, slopes
from tests.objectives.oracles import DIGITS, STEP, Pair, exactly
from tests.objectives.oracles_of_guided import modpo

BATCH = Batch(6, seed=3)
DRAW = random.Random(5)
GUIDES = [(float(p.b_w) + DRAW.gauss(0, 3), float(p.b_l) + DRAW.gauss(0, 3)) for p in BATCH.pairs]
GUIDE = PairLogps(*(torch.tensor(side, dtype=torch.float64) for side in zip(*GUIDES, strict=True)))
REFERENCE = PairLogps(*BATCH.both("b"))


@pytest.mark.parametrize(
    "parameters",
    [
        {"beta": 0.1, "own_weight": 0.5, "guide_beta": 0.1},
        {"beta": 0.4, "own_weight": 0.1, "guide_beta": 0.3},
        {"beta": 0.4, "own_weight": 1.0, "guide_beta": 0.3},
    ],
)
def test_losses_log_odds_and_slopes_are_the_printed_ones(parameters):
    policy = BATCH.policy()
    out = build_objective("modpo", **parameters)(policy, REFERENCE, guide=GUIDE)
    given = exactly(parameters)

    def of(pair: Pair, place: int) -> tuple[Decimal, Decimal]:
        return modpo(pair, tuple(Decimal(side) for side in GUIDES[place]), **given)

    with localcontext(DIGITS):
        exact = [of(pair, place) for place, pair in enumerate(BATCH.pairs)]
        moved = {
            name: [
                (
                    of(replace(p, **{name: getattr(p, name) + STEP}), i)[0]
                    - of(replace(p, **{name: getattr(p, name) - STEP}), i)[0]
                )
                / (2 * STEP)
                for i, p in enumerate(BATCH.pairs)
            ]
            for name in ("a_w", "a_l")
        }
    close(out.losses, [loss for loss, _ in exact])
    close(out.log_odds, [odds for _, odds in exact])
    for slope, expected in zip(slopes(out, policy), moved.values(), strict=True):
        close(slope, expected)


@pytest.mark.parametrize("focal", [None, {"form": "p_gamma", "gamma": 0.05}])
def test_with_the_whole_weight_it_is_dpo(focal):
    found = build_objective("modpo", beta=0.3, own_weight=1.0, focal=focal)(BATCH.policy(), REFERENCE, guide=GUIDE)
    expected = build_objective("dpo", beta=0.3, focal=focal)(BATCH.policy(), REFERENCE)
    assert torch.equal(found.losses, expected.losses)


def test_a_guide_that_is_the_reference_scales_beta():
    found = build_objective("modpo", beta=0.1, own_weight=0.5)(BATCH.policy(), REFERENCE, guide=REFERENCE)
    expected = build_objective("dpo", beta=0.2)(BATCH.policy(), REFERENCE)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_every_focal_factor_goes_around_it(form):
    objective = build_objective("modpo", beta=0.1, focal={"form": form, "gamma": 0.05})
    out = objective(BATCH.policy(), REFERENCE, guide=GUIDE)
    assert bool(out.losses.isfinite().all())


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_out_losses_and_slopes_stay_finite(far):
    policy = PairLogps(*(torch.tensor([side], requires_grad=True) for side in (far, -far)))
    still = PairLogps(*(torch.zeros(1) for _ in "wl"))
    out = build_objective("modpo", beta=0.1)(policy, still, guide=still)
    assert bool(out.losses.isfinite().all())
    assert all(bool(slope.isfinite().all()) for slope in slopes(out, policy))
