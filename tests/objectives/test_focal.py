"""FocalPO's loss and weights: the paper's equations, limits, and where careless forms break."""

from __future__ import annotations

import math

import pytest
import torch

from lorafocal.objectives import PairLogps, dpo, focalpo
from lorafocal.objectives.focal import (
    focal_loss,
    focal_ratio_to_dpo,
    focal_weight,
    identity_loss,
    turning_point,
)
from lorafocal.objectives.pairwise import dpo_weight

GAMMAS = [0.0, 0.01, 0.05, 0.2, 0.5, 1.0]


def logps(*values: float, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def gradient(margin: torch.Tensor, gamma: float) -> torch.Tensor:
    margin = margin.detach().clone().requires_grad_()
    focal_loss(margin, gamma=gamma).sum().backward()
    return margin.grad


@pytest.mark.row("64")
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_gradient_is_the_closed_form_of_the_papers_equation_6(gamma):
    margin = torch.linspace(-60, 60, 2001, dtype=torch.float64)
    torch.testing.assert_close(-gradient(margin, gamma), focal_weight(margin, gamma=gamma), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_is_equation_4_written_with_probabilities_where_those_are_safe(gamma):
    margin = torch.linspace(-20, 20, 401, dtype=torch.float64)
    p = 1 / (1 + (-margin).exp())
    torch.testing.assert_close(focal_loss(margin, gamma=gamma), -(p**gamma) * p.log(), rtol=1e-12, atol=1e-15)


@pytest.mark.row("64")
def test_gamma_zero_is_dpo_bit_for_bit_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(512, generator=generator) * 200 for _ in range(4)]
    results = []
    for loss in (dpo, lambda p, r, beta: focalpo(p, r, beta=beta, gamma=0.0)):
        leaves = [value.clone().requires_grad_() for value in values]
        out = loss(PairLogps(*leaves[:2]), PairLogps(*leaves[2:]), beta=0.1)
        out.losses.sum().backward()
        results.append([out.losses, out.margins, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.row("11")
@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradient_stay_finite_and_accurate_at_extreme_margins(gamma):
    margin = torch.cat((torch.linspace(-1e4, 1e4, 2001), torch.linspace(-200, 200, 4001)))
    assert focal_loss(margin, gamma=gamma).isfinite().all()
    assert gradient(margin, gamma).isfinite().all()
    near = margin[margin.abs() <= 200]
    exact = focal_loss(near.double(), gamma=gamma)
    rounding = torch.finfo(torch.float32).eps * (4 + gamma * near.abs())  # of exp's argument, and a few operations
    assert ((focal_loss(near, gamma=gamma).double() - exact).abs() <= rounding * exact + 1e-30).all()


@pytest.mark.row("11")
def test_the_objective_computes_in_fp32_whatever_the_dtype_of_the_log_probs():
    policy = PairLogps(*(logps(value, dtype=torch.bfloat16, grad=True) for value in (-300.0, -302.0)))
    reference = PairLogps(*(logps(value, dtype=torch.bfloat16) for value in (-1.0, -2.0)))
    out = focalpo(policy, reference, beta=1.0, gamma=0.05)
    assert out.losses.dtype == torch.float32
    assert out.margins.tolist() == [1.0]  # in bf16 both logratios round to -300
    zero = PairLogps(logps(0.0), logps(0.0))
    assert focalpo(PairLogps(*(x.double() for x in zero)), zero, beta=1.0, gamma=0.05).losses.dtype == torch.float64


@pytest.mark.row("64")
def test_the_factor_is_not_detached():
    """The stop-gradient form has the weight (1 - p) p^gamma; the paper's has the second term too."""
    margin = torch.tensor([-2.0], dtype=torch.float64)
    p = torch.sigmoid(margin)
    detached = (1 - p) * p**0.05
    assert abs(float(-gradient(margin, 0.05) / detached) - 1) > 0.1


def test_golden_values_of_gamma_0_05():
    z = torch.tensor([-10.0, -5, -3, -2, -1, 0, 1, 2, 5], dtype=torch.float64)
    ratio = torch.tensor([0.303, 0.584, 0.728, 0.804, 0.875, 0.932, 0.969, 0.987, 0.999], dtype=torch.float64)
    torch.testing.assert_close(focal_ratio_to_dpo(z, gamma=0.05), ratio, rtol=0, atol=6e-4)
    assert float(focal_weight(z[5], gamma=0.05)) == pytest.approx(0.46623, abs=5e-6)
    fine = torch.linspace(-4, 0, 400_001, dtype=torch.float64)
    weights = focal_weight(fine, gamma=0.05)
    assert float(fine[weights.argmax()]) == pytest.approx(-2.2384432, abs=2e-5)
    assert float(weights.max()) == pytest.approx(0.7098380, abs=1e-7)


@pytest.mark.row("2")
def test_identity_loss():
    assert identity_loss(0.05) == pytest.approx(0.669536, abs=5e-7)
    assert identity_loss(0.0) == pytest.approx(math.log(2), abs=1e-15)
    assert float(focal_loss(torch.zeros(()), gamma=0.05)) == pytest.approx(identity_loss(0.05), rel=1e-6)


@pytest.mark.parametrize(
    ("gamma", "where"),
    [(0.01, -100.0), (0.05, -19.9999999979), (0.1, -9.99995), (0.2, -4.9932), (0.5, -1.8546), (1.0, -0.5413)],
)
def test_the_gradient_turns_round_at_the_turning_point(gamma, where):
    turn = turning_point(gamma)
    assert turn == pytest.approx(where, abs=5e-5)
    around = torch.tensor([turn - 1e-3, turn + 1e-3], dtype=torch.float64)
    below, above = focal_weight(around, gamma=gamma)
    assert below < 0 < above


def test_without_gamma_nothing_ever_turns():
    assert turning_point(0.0) == -math.inf


def test_weights_never_exceed_dpo():
    margin = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    assert (focal_weight(margin, gamma=0.05) <= dpo_weight(margin)).all()


def test_rewards_are_beta_times_logratio_and_detached():
    policy = PairLogps(logps(-1.0, -2.0, grad=True), logps(-3.0, -4.0, grad=True))
    out = focalpo(policy, PairLogps(logps(-2.0, -2.0), logps(-2.5, -5.0)), beta=0.5, gamma=0.05)
    assert out.chosen_rewards.tolist() == [0.5, 0.0]
    assert out.rejected_rewards.tolist() == [-0.25, 0.5]
    assert out.margins.tolist() == [0.75, -0.5]
    assert not out.margins.requires_grad
    assert out.losses.requires_grad
