"""Several references as one: MRPO's harmonic mean and INPO's geometric one, against their printed equations."""

from __future__ import annotations

import random
from decimal import Decimal, localcontext

import pytest
import torch

from lorafocal.objectives import PairLogps, build_objective
from lorafocal.references.combined import geometric, harmonic
from tests.objectives.oracles import DIGITS

PAIRS, MEMBERS = 6, 3


def drawn(seed: int = 0) -> list[PairLogps]:
    draw = random.Random(seed)
    return [
        PairLogps(*(torch.tensor([-draw.uniform(5, 60) for _ in range(PAIRS)], dtype=torch.float64) for _ in "wl"))
        for _ in range(MEMBERS)
    ]


def printed(members: list[PairLogps], pair: int, weights: list[float] | str, clip: float) -> tuple[Decimal, Decimal]:
    """Le et al. 2024 (arXiv 2405.16388): (sum_k alpha_k / pi_k)^-1 of members clipped around the first, one pair."""
    with localcontext(DIGITS):
        rows = [tuple(Decimal(float(side[pair])) for side in member) for member in members]
        gaps = [abs(won - lost) for won, lost in rows]
        alphas = [gap / sum(gaps) for gap in gaps] if weights == "adaptive" else [Decimal(w) for w in weights]
        means = [abs(sum(row[side] for row in rows) / len(rows)) for side in (0, 1)]
        found = []
        for side in (0, 1):
            room = Decimal(clip) * means[side] / sum(means)
            base = rows[0][side]
            edges = sorted((base * (1 + room), base * (1 - room)))
            held = [base, *(min(max(row[side], edges[0]), edges[1]) for row in rows[1:])]
            found.append(-sum(alpha * (-b).exp() for alpha, b in zip(alphas, held, strict=True)).ln())
        return found[0], found[1]


@pytest.mark.parametrize("weights", ["adaptive", [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("clip", [0.1, 0.02, 1e6])
def test_the_harmonic_mean_is_the_printed_one(weights, clip):
    members = drawn()
    found = harmonic(members, weights, clip=clip)
    for pair in range(PAIRS):
        for side, expected in zip(found, printed(members, pair, weights, clip), strict=True):
            assert float(side[pair]) == pytest.approx(float(expected), rel=1e-12)


def test_a_mean_of_one_model_is_that_model():
    same = [drawn()[0]] * 3
    for weights in ("adaptive", [0.2, 0.2, 0.6]):
        for found, own in zip(harmonic(same, weights, clip=0.1), same[0], strict=True):
            assert torch.allclose(found, own, atol=1e-12)
    stacked = torch.stack([member.chosen for member in same])
    assert torch.allclose(geometric(stacked, [0.2, 0.2, 0.6]), same[0].chosen, atol=1e-12)


def test_members_stay_within_the_clip_of_the_first():
    members, clip = drawn(1), 0.1
    found = harmonic(members, "adaptive", clip=clip)
    for side, first in zip(found, members[0], strict=True):
        assert bool(((side - first).abs() <= clip * first.abs() + 1e-12).all())


def test_far_log_probs_and_members_that_tell_nothing_apart_stay_finite():
    far = PairLogps(torch.tensor([-1e4, 0.0, -1.0]), torch.tensor([-1e4, 0.0, -1.0]))
    near = PairLogps(torch.tensor([-2e4, 0.0, -900.0]), torch.tensor([-2e4, 0.0, -900.0]))
    for clip in (0.1, 1e6):
        assert all(bool(side.isfinite().all()) for side in harmonic([far, near], "adaptive", clip=clip))
    assert harmonic([far, near], "adaptive", clip=0.1).chosen.dtype == torch.float32


@pytest.mark.parametrize(("tau", "eta"), [(0.1, 0.5), (0.3, 0.4)])
def test_ipo_on_the_geometric_mean_is_inpo(tau, eta):
    """Zhang et al. 2024 (arXiv 2407.00617): (h - 1/(2 eta))^2, where h is log pi_w/pi_l - tau/eta log ref_w/ref_l -
    (eta - tau)/eta log last_w/last_l."""
    first, last, policy = drawn(2)
    shares = [tau / eta, 1 - tau / eta]
    reference = PairLogps(*(geometric(torch.stack(sides), shares) for sides in zip(first, last, strict=True)))
    found = build_objective("ipo-sum", tau=eta)(policy, reference).losses
    for pair in range(PAIRS):
        with localcontext(DIGITS):
            (a_w, a_l), (b_w, b_l), (c_w, c_l) = (
                (Decimal(float(model.chosen[pair])), Decimal(float(model.rejected[pair])))
                for model in (policy, first, last)
            )
            t, e = Decimal(tau), Decimal(eta)
            h = (a_w - a_l) - t / e * (b_w - b_l) - (e - t) / e * (c_w - c_l)
            expected = (h - 1 / (2 * e)) ** 2
        assert float(found[pair]) == pytest.approx(float(expected), rel=1e-10)
