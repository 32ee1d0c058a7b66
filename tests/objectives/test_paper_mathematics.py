"""What docs/mathematics.md says of the paper, beyond the losses' own tests: Eq. 3, Lemma 1, the exponent."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from lorafocal.objectives.focal import focal_loss, focal_ratio_to_dpo, focal_weight
from lorafocal.objectives.pairwise import dpo_weight

GAMMA = 0.05


def equation_3(z: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1-p)^-gamma log p, in log space."""
    return -torch.exp(-gamma * logsigmoid(-z)) * logsigmoid(z)


def equation_3_as_printed(z: torch.Tensor, gamma: float) -> torch.Tensor:
    p = torch.sigmoid(z)
    return -((1 - p) ** -gamma) * torch.log(p)


def test_the_nan_of_equation_3_is_of_the_form_it_is_written_in() -> None:
    z = torch.arange(-88.0, 400.0, 0.25).requires_grad_()
    [slope] = torch.autograd.grad(equation_3_as_printed(z, GAMMA).sum(), z)
    broken = ~(equation_3_as_printed(z, GAMMA).isfinite() & slope.isfinite())
    assert float(z.detach()[broken].min()) == 16.75  # 1 - p is 0 in float32
    [slope] = torch.autograd.grad(equation_3(z, GAMMA).sum(), z)
    assert equation_3(z, GAMMA).isfinite().all()
    assert slope.isfinite().all()
    near = z.detach()[~broken].double()
    torch.testing.assert_close(equation_3(near, GAMMA), equation_3_as_printed(near, GAMMA), rtol=1e-7, atol=0)


def test_equation_4_is_not_equation_3_and_a_constant() -> None:
    p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    gap = equation_3(torch.logit(p), GAMMA) - focal_loss(torch.logit(p), gamma=GAMMA)
    assert gap.tolist() == pytest.approx([2.018, 0.949, 0.263, 0.048, 0.013, 0.003], abs=6e-4)


def test_equation_3_leaves_hard_pairs_and_lifts_easy_ones_where_equation_4_does_the_opposite() -> None:
    z = torch.tensor([-10.0, 10.0], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(equation_3(z, GAMMA).sum(), z)
    third = (-slope / dpo_weight(z.detach())).tolist()
    fourth = focal_ratio_to_dpo(z.detach(), gamma=GAMMA).tolist()
    assert third == pytest.approx([1.0, 1.57], abs=5e-3)
    assert fourth == pytest.approx([0.303, 1.0], abs=5e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.3, 0.5, 1.0])
def test_lemma_1_bounds_the_loss_and_says_nothing_where_it_would_matter(gamma: float) -> None:
    """L_FocalPO <= gamma H + (1 - gamma) L_DPO with H = -p log p, in float64."""
    z = torch.linspace(-700, 40, 100_001, dtype=torch.float64)
    p, lp = torch.sigmoid(z), logsigmoid(z)
    bound = -gamma * p * lp - (1 - gamma) * lp
    loss = focal_loss(z, gamma=gamma)
    rounding = torch.finfo(torch.float64).eps * (4 - lp) * bound.abs()  # of exp's argument, and a few operations
    assert (loss <= bound + rounding).all()
    if 0 < gamma < 1:  # at a hopeless pair the loss vanishes and the bound does not
        assert float(loss[0]) < 1e-4 * float(bound[0])


def test_a_higher_exponent_weakens_hard_pairs_only_down_to_twice_the_turning_point() -> None:
    log_p = torch.tensor([-39.0, -41.0], dtype=torch.float64)  # about 2/gamma = 40
    z = log_p - torch.log(-torch.expm1(log_p))
    less, more = (focal_weight(z, gamma=gamma) for gamma in (GAMMA - 1e-6, GAMMA + 1e-6))
    assert bool(more[0] < less[0])
    assert bool(more[1] > less[1])


def test_misranked_pairs_keep_more_weight_than_ties_for_long() -> None:
    z = torch.linspace(-8, 0, 800_001, dtype=torch.float64)
    weight, tie = focal_weight(z, gamma=GAMMA), focal_weight(torch.zeros((), dtype=torch.float64), gamma=GAMMA)
    above = z[weight > tie]
    assert float(above.min()) == pytest.approx(-6.851, abs=6e-4)
    half = z[focal_ratio_to_dpo(z, gamma=GAMMA) < 0.5]
    assert float(half.max()) == pytest.approx(-6.297, abs=6e-4)


def test_the_most_negative_weight() -> None:
    z = torch.linspace(-60, -20, 400_001, dtype=torch.float64)
    weight = focal_weight(z, gamma=GAMMA)
    assert float(weight.min()) == pytest.approx(-math.exp(-2), abs=1e-4)
    assert float(z[weight.argmin()]) == pytest.approx(-2 / GAMMA, abs=0.01)
