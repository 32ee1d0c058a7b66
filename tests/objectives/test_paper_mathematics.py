"""What docs/mathematics.md says of the paper, beyond the losses' own tests: Eq. 3, Lemma 1, the words and the slips."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.focal import (
    eq3,
    focal_loss,
    focal_ratio_to_dpo,
    focal_weight,
    focal_weight_terms,
    turning_point,
)
from lorafocal.objectives.pairwise import dpo_loss, dpo_weight

GAMMA = 0.05


def equation_3(z: Tensor, gamma: float) -> Tensor:
    """As it is trained."""
    return eq3(dpo_loss(z), z, gamma=gamma)


def equation_3_as_printed(z: Tensor, gamma: float) -> Tensor:
    p = torch.sigmoid(z)
    return -((1 - p) ** -gamma) * torch.log(p)


def equation_4_as_printed(z: Tensor, gamma: float) -> Tensor:
    p = torch.sigmoid(z)
    return -(p**gamma) * torch.log(p)


def equation_3_by_logarithms(z: Tensor, gamma: float) -> Tensor:
    return -torch.exp(-gamma * logsigmoid(-z)) * logsigmoid(z)


def equation_4_by_logarithms(z: Tensor, gamma: float) -> Tensor:
    return -torch.exp(gamma * logsigmoid(z)) * logsigmoid(z)


def slope(losses_of: Callable[[Tensor, float], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(losses_of(z, GAMMA).sum(), z)[0]


def test_the_nan_of_equation_3_is_of_the_form_it_is_written_in() -> None:
    z = torch.arange(-88.0, 400.0, 0.25)
    broken = ~(equation_3_as_printed(z, GAMMA).isfinite() & slope(equation_3_as_printed, z).isfinite())
    assert float(z[broken].min()) == 16.75  # 1 - p is 0 in float32
    assert equation_3(z, GAMMA).isfinite().all()
    assert slope(equation_3, z).isfinite().all()
    near = z[~broken].double()
    torch.testing.assert_close(equation_3(near, GAMMA), equation_3_as_printed(near, GAMMA), rtol=1e-7, atol=0)


# form, dtype, where it breaks first below and above 0
BREAKS = [
    (equation_4_as_printed, torch.float32, -88.75, None),
    (equation_4_as_printed, torch.bfloat16, -89.0, None),
    (equation_4_as_printed, torch.float16, -11.75, None),
    (equation_3_as_printed, torch.float32, -88.75, 16.75),
    (equation_3_as_printed, torch.bfloat16, -89.0, 6.25),
    (equation_3_as_printed, torch.float16, -11.25, 8.5),
    (equation_3_by_logarithms, torch.float16, None, 222.0),
    *((form, dtype, None, None) for form in (equation_3_by_logarithms,) for dtype in (torch.float32, torch.bfloat16)),
    *((equation_4_by_logarithms, dtype, None, None) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("form", "dtype", "below", "above"), BREAKS)
def test_where_each_form_first_breaks(
    form: Callable[[Tensor, float], Tensor], dtype: torch.dtype, below: float | None, above: float | None
) -> None:
    """Loss or slope not finite, on a grid of quarters to 400 (of what the dtype has of them)."""
    z = torch.arange(-400, 400.25, 0.25).to(dtype)
    broken = z[~(form(z, GAMMA).isfinite() & slope(form, z).isfinite())].float()
    assert (broken[broken < 0].max().item() if (broken < 0).any() else None) == below
    assert (broken[broken > 0].min().item() if (broken > 0).any() else None) == above


def test_equation_4_is_not_equation_3_and_a_constant() -> None:
    p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    gap = equation_3(torch.logit(p), GAMMA) - focal_loss(torch.logit(p), gamma=GAMMA)
    assert gap.tolist() == pytest.approx([2.018, 0.949, 0.263, 0.048, 0.013, 0.003], abs=6e-4)


def test_equation_3_leaves_hard_pairs_and_lifts_easy_ones_where_equation_4_does_the_opposite() -> None:
    z = torch.tensor([-10.0, 10.0], dtype=torch.float64)
    third = (-slope(equation_3, z) / dpo_weight(z)).tolist()
    fourth = focal_ratio_to_dpo(z, gamma=GAMMA).tolist()
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


def test_the_gap_of_equations_3_and_4_to_first_order() -> None:
    z = torch.linspace(-8, 8, 161, dtype=torch.float64)
    p, small = torch.sigmoid(z), 1e-6
    gap = equation_3(z, small) - focal_loss(z, gamma=small)
    first = torch.log(p * (1 - p)) * torch.log(p)
    torch.testing.assert_close(gap / small, first, rtol=1e-4, atol=1e-9)
    assert float(first[0]) > 10 * float(first[80])  # no constant: it grows without limit as p goes to 0


def test_the_lemma_with_a_whole_entropy_is_looser_than_dpo_itself_on_half_of_the_range() -> None:
    """The bound minus L_DPO is gamma (1 - p) z; and L_FocalPO <= L_DPO needs no lemma."""
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    p, dpo = torch.sigmoid(z), -logsigmoid(z)
    entropy = -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)
    beyond = GAMMA * entropy + (1 - GAMMA) * dpo - dpo
    torch.testing.assert_close(beyond, GAMMA * (1 - p) * z, rtol=1e-9, atol=1e-13)
    assert bool((focal_loss(z, gamma=GAMMA) <= dpo).all())


def test_the_factor_tends_to_one_as_the_preference_becomes_sure() -> None:
    """The introduction says that it decays to zero: that is (1 - p)^gamma, of the focal loss."""
    z = torch.linspace(-40, 40, 801, dtype=torch.float64)
    factor = focal_loss(z, gamma=GAMMA) / -logsigmoid(z)
    assert bool((factor.diff() >= -1e-12).all())
    assert float(factor[-1]) == pytest.approx(1)
    assert float(factor[0]) == pytest.approx(math.exp(-2), rel=1e-9)


def test_the_peak_is_at_0_for_one_gamma_only() -> None:
    z = torch.linspace(-3, 2, 500_001, dtype=torch.float64)
    peaks = [float(z[focal_weight(z, gamma=gamma).argmax()]) for gamma in (0.05, 0.4, 0.41581, 0.43, 1.0)]
    assert peaks == sorted(peaks)
    assert peaks[1] < -0.01
    assert peaks[2] == pytest.approx(0, abs=1e-4)
    assert peaks[3] > 0.01


def test_at_the_margins_of_a_real_run_it_is_nearly_dpo_with_a_smaller_step() -> None:
    """Margins of 0.3 +- 0.6, normal: the weights correlate 0.9985 with DPO's, and are 0.934 of them on the whole."""
    deviations = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    z, density = 0.3 + 0.6 * deviations, torch.exp(-(deviations**2) / 2)
    both = torch.stack([dpo_weight(z), focal_weight(z, gamma=GAMMA)])
    covariance = torch.cov(both, aweights=density)
    correlation = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    dpo, focal = (both * density).sum(1)
    assert float(correlation) == pytest.approx(0.9985, abs=5e-5)
    assert float(focal / dpo) == pytest.approx(0.934, abs=5e-4)


@pytest.mark.parametrize(("beta", "nats"), [(0.01, -2000), (0.1, -200), (2.0, -10)])
def test_how_far_the_turning_point_is_in_nats(beta: float, nats: float) -> None:
    assert turning_point(GAMMA) / beta == pytest.approx(nats, abs=1e-5)
    objective = build_objective("focalpo", beta=beta, gamma=GAMMA)
    zero, sides = torch.zeros(2), torch.tensor([nats + 0.01 / beta, nats - 0.01 / beta])
    odds = objective(PairLogps(sides, zero), PairLogps(zero, zero)).log_odds
    assert odds is not None
    assert (objective.weights(odds) < 0).tolist() == [False, True]


# ---- the printed equations -------------------------------------------------------------------------------------------

BETA = 0.1


def log_probs(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Of a made-up policy with one parameter: its two answers'."""
    return -40 - 3 * torch.sin(theta), -35 + theta**2


def slopes_of_a_model() -> dict[str, float]:
    """Of Eq. 4 in the parameter by autograd, and the pieces that the printed gradients are made of."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def derivative(of: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float(torch.autograd.grad(of(*log_probs(theta)), theta)[0])

    reference = [-42.0, -33.0]
    chosen, rejected = (float(x) for x in log_probs(theta.detach()))
    z = torch.tensor(BETA * ((chosen - reference[0]) - (rejected - reference[1])), dtype=torch.float64)
    first, second = (float(term) for term in focal_weight_terms(z, gamma=GAMMA))

    def loss(w: Tensor, lost: Tensor) -> Tensor:
        return focal_loss(BETA * ((w - reference[0]) - (lost - reference[1])), gamma=GAMMA)

    return {
        "loss": derivative(loss),
        "log of a quotient": derivative(lambda w, lost: w - lost),
        "quotient of logs": derivative(lambda w, lost: w / lost),
        "first term": first,
        "second term": second,
        "z": float(z),
    }


def test_the_gradient_is_of_the_log_of_a_quotient() -> None:
    """Eq. 5, 6, 12 and 14 print nabla (log pi_w / log pi_l)."""
    model = slopes_of_a_model()
    weight = model["first term"] + model["second term"]
    assert model["loss"] == pytest.approx(-BETA * weight * model["log of a quotient"], rel=1e-12)
    assert abs(model["loss"] / (-BETA * weight * model["quotient of logs"]) - 1) > 0.5


def test_both_terms_of_the_gradient_carry_the_minus() -> None:
    """Eq. 11 and lines 2 and 3 of Eq. 14 lack it (the slope's sign is wrong), line 1 has it on one term alone."""
    model = slopes_of_a_model()
    first, second = (BETA * model[term] * model["log of a quotient"] for term in ("first term", "second term"))
    assert model["loss"] == pytest.approx(-first - second, rel=1e-12)
    for printed in (first + second, first - second):
        assert abs(printed / model["loss"] - 1) > 0.01


def test_beta_belongs_inside_the_sigmoid() -> None:
    """Eq. 12's second equality has beta sigma(h) for sigma(beta h)."""
    h = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    [by_autograd] = torch.autograd.grad(dpo_loss(BETA * h), h)
    inside, outside = -BETA * torch.sigmoid(-BETA * h), -BETA * (1 - BETA * torch.sigmoid(h))
    torch.testing.assert_close(by_autograd, inside.detach(), rtol=1e-12, atol=0)
    assert abs(float((outside / by_autograd).detach()) - 1) > 0.5


def test_ranked_right_by_the_likelihood_is_not_ranked_right_by_the_reward() -> None:
    """Chen et al. (2024) say it of a_w > a_l; p is of the implicit reward, and is 1/2 for every pair at the start."""
    chosen, rejected = torch.tensor([-30.0, -50.0]), torch.tensor([-50.0, -30.0])
    start = PairLogps(chosen, rejected)
    odds = build_objective("focalpo", beta=0.1, gamma=GAMMA)(start, start).log_odds
    assert odds is not None
    assert odds.tolist() == [0.0, 0.0]
    assert (chosen > rejected).tolist() == [True, False]
