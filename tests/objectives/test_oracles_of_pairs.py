"""Losses of pairs, averages and scores against their papers' equations, far out, and where one is another."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal.objectives import OBJECTIVES, PairLogps, PairLosses, PairScores, build_objective
from lorafocal.objectives.factor import FORMS
from lorafocal.objectives.objective import Objective
from tests.objectives import oracles_of_pairs as oracles
from tests.objectives.batch import GAMMAS, Batch, close, each_of, slopes
from tests.objectives.oracles import Pair

# Each loss at the recipe's values and at others. Betas keep log-odds within some tens.
CASES: list[tuple[str, dict[str, float]]] = [
    ("dpo-gamma", {"beta": 0.3, "reference_strength": 0.1}),
    ("dpo-gamma", {"beta": 0.3, "reference_strength": 1.2}),
    ("flex-dpo", {"beta": 0.5, "beta_rejected": 0.3}),
    ("dpop", {"beta": 0.3, "lambda_": 50.0}),
    ("dpop", {"beta": 0.3, "lambda_": 0.5}),
    ("f-dpo-forward-kl", {"beta": 0.1}),
    ("f-dpo-js", {"beta": 0.1}),
    ("f-dpo-js", {"beta": 2.0}),
    ("f-dpo-alpha", {"beta": 0.1, "alpha": 0.5}),
    ("f-dpo-alpha", {"beta": 0.3, "alpha": 0.1}),
    ("mappo", {"beta": 0.5}),
    ("regularised-rpo", {"beta": 0.01, "eta": 0.005}),
    ("regularised-rpo", {"beta": 0.5, "eta": 0.4}),
    ("irpo", {"beta": 0.1, "nll_weight": 1.0}),
    ("irpo", {"beta": 0.5, "nll_weight": 0.2}),
    ("anchored-dpo", {"beta": 0.1, "anchor": 0.0}),
    ("anchored-dpo", {"beta": 0.5, "anchor": -0.7}),
    ("exo", {"beta": 0.1, "label_smoothing": 1e-3}),
    ("exo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("discopop", {"beta": 0.05, "tau": 0.05}),
    ("discopop", {"beta": 0.5, "tau": 1.0}),
    ("hinge", {"beta": 0.05}),
    ("hinge", {"beta": 0.3}),
    ("repo", {"target_margin": 0.5}),
    ("repo", {"target_margin": 0.0}),
    ("ipo", {"tau": 0.1}),
    ("ipo", {"tau": 2.0}),
    ("ipo-sum", {"tau": 0.1}),
    ("orpo", {"lambda_": 0.1}),
    ("orpo", {"lambda_": 2.0}),
    ("sppo", {"beta": 1e-3}),
    ("sppo", {"beta": 0.2}),
    ("sppo-hard", {"beta": 1e-3}),
    ("reward-aware-squared", {"beta": 0.2, "eta": 1.0}),
    ("reward-aware-backward", {"beta": 0.2, "eta": 1.0}),
    ("reward-aware-backward", {"beta": 1.0, "eta": 20.0}),
    ("reward-aware-forward", {"beta": 0.2, "eta": 1.0}),
    ("reward-aware-forward", {"beta": 1.0, "eta": 20.0}),
    ("todo", {"beta": 0.01, "alpha": 0.5}),
    ("todo", {"beta": 0.5, "alpha": 2.0}),
]
each_case = each_of(CASES)


class UnitBatch(Batch):
    """The same with scores from 0 to 1, some tied."""

    @staticmethod
    def _one(draw: random.Random) -> Pair:
        low = draw.uniform(0, 0.6)
        high = low if draw.random() < 0.3 else low + draw.uniform(0.01, 0.4)
        return replace(Batch._one(draw), s_w=Decimal(high), s_l=Decimal(low))


BATCH = UnitBatch(6, seed=1)


def wrappers(name: str, gammas: dict[str, float] = GAMMAS) -> list[dict[str, Any] | None]:
    """None, and every factor that the objective takes."""
    forms = FORMS if name in oracles.WRAPPABLE else ()
    return [None, *({"form": x, "gamma": gammas[x]} for x in forms if x != "eq3" or OBJECTIVES[name].logistic)]


def test_the_batch_has_ties_and_its_scores_are_exact() -> None:
    tied = torch.eq(*BATCH.both("s"))
    assert 0 < tied.sum() < len(tied)
    assert {name for name, _ in CASES} == set(oracles.NAMES) <= OBJECTIVES.keys()


# ---- the printed equations -------------------------------------------------------------------------------------------


@pytest.mark.row("11")
@each_case
def test_value_slopes_log_odds_and_rewards_are_the_paper_s(name: str, parameters: dict[str, float]) -> None:
    for focal in wrappers(name):
        policy = BATCH.policy()
        out = BATCH(build_objective(name, focal=focal, **parameters), policy)
        expected = [oracles.value(name, pair, focal, **parameters) for pair in BATCH.pairs]
        close(out.losses, [one.loss for one in expected])
        assert (out.log_odds is None) == (expected[0].log_odds is None) == (not OBJECTIVES[name].bradley_terry)
        if out.log_odds is not None:
            close(out.log_odds, [one.log_odds for one in expected])
            assert not out.log_odds.requires_grad
        for rewards, exact in zip(out[1:3], zip(*(one.rewards for one in expected), strict=True), strict=True):
            close(rewards, exact)
            assert not rewards.requires_grad
        gradients = [oracles.slopes(name, pair, focal, **parameters) for pair in BATCH.pairs]
        for slope, exact in zip(slopes(out, policy), zip(*gradients, strict=True), strict=True):
            close(slope, exact, rtol=1e-10)


def test_sft_is_the_chosen_answer_s_nats_a_token() -> None:
    policy = BATCH.policy()
    losses = BATCH(build_objective("sft"), policy).losses
    close(losses, [-x.a_w / x.n_w for x in BATCH.pairs])
    [slope] = torch.autograd.grad(losses.sum(), [policy.chosen])
    close(slope, [-1 / x.n_w for x in BATCH.pairs])


# ---- far out ---------------------------------------------------------------------------------------------------------

SIZES = (1e-3, 1.0, 17.0, 29.9, 30.1, 88.0, 90.0, 104.0, 400.0, 1e4)  # where sigmoid and exp of float32 end, and beyond
PLACES = torch.tensor([sign * size for size in SIZES for sign in (1, -1)])
FAR = torch.cartesian_prod(PLACES, PLACES)  # log-ratios of chosen and rejected answers
PAPER = {"p_gamma": 0.05, "eq3": 1.0, "hard": 1.0, "detached": 0.05}


def at(objective: Objective, policy: PairLogps, ties: bool = False) -> PairLosses:
    """The objective of these log-probs against a reference of zeros, every answer of 7 tokens."""
    zeros = torch.zeros_like(policy.chosen)
    scores = PairScores(0.9 + 0 * zeros.double(), (0.9 if ties else 0.2) + 0 * zeros.double())
    lengths = torch.full((2 * len(zeros),), 7)
    return objective(policy, PairLogps(zeros, zeros), lengths, scores=scores)


@pytest.mark.row("11")
@each_case
def test_float32_stays_finite_at_log_ratios_of_ten_thousand(name: str, parameters: dict[str, float]) -> None:
    for focal in wrappers(name, PAPER):
        for ties in (False, True):
            policy = PairLogps(*(side.clone().requires_grad_() for side in FAR.T))
            out = at(build_objective(name, focal=focal, **parameters), policy, ties)
            assert out.losses.dtype == torch.float32
            for tensor in (out.losses, *slopes(out, policy), out.chosen_rewards, out.rejected_rewards):
                assert tensor.isfinite().all(), focal
            if out.log_odds is not None:
                assert out.log_odds.isfinite().all()
                assert build_objective(name, **parameters).weights(out.log_odds, *out.constants).isfinite().all()


@pytest.mark.row("11")
def test_a_steep_divergence_keeps_its_order_past_the_range_of_floats() -> None:
    """Cut off instead, exp would tell two rejected answers at -40 and -100 nats no more apart, and teach nothing."""
    for name, parameters in (("f-dpo-forward-kl", {}), ("f-dpo-alpha", {"alpha": 0.9})):
        far = PairLogps(*(torch.tensor([side, -50.0], requires_grad=True) for side in (-100.0, -120.0)))
        out = at(build_objective(name, beta=1e-15, **parameters), far)
        assert 0 < out.margins[0] < math.inf
        assert all(slope.abs().min() > 0 for slope in slopes(out, far))


# ---- what must be one and the same -----------------------------------------------------------------------------------

ONE_SIDED = PairScores(torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
E = 0.03
SAID = PairScores(torch.full((6,), math.log((1 - E) / E), dtype=torch.float64), ONE_SIDED.rejected)
DPO = ("dpo", {"beta": 0.3})

Named = tuple[str, dict[str, float]]
ALIKE: list[tuple[Named, Named, PairScores | None, float]] = [
    (("dpo-gamma", {"beta": 0.3, "reference_strength": 1.0}), DPO, None, 1e-12),
    (("flex-dpo", {"beta": 0.3, "beta_rejected": 0.3}), DPO, None, 1e-12),
    (("dpo-shift", {"beta": 0.3, "rejected_factor": 1.0}), DPO, None, 1e-12),
    (("dpop", {"beta": 0.3, "lambda_": 0.0}), DPO, None, 1e-12),
    (("mappo", {"beta": 0.3}), DPO, ONE_SIDED, 1e-12),
    (("regularised-rpo", {"beta": 0.3, "eta": 0.0}), DPO, None, 1e-12),
    (("irpo", {"beta": 0.3, "nll_weight": 0.0}), DPO, None, 1e-12),
    (("anchored-dpo", {"beta": 0.3, "anchor": -1e6}), DPO, None, 1e-12),
    (("todo", {"beta": 0.3, "alpha": 1e-13}), DPO, ONE_SIDED, 1e-11),
    (("f-dpo-alpha", {"beta": 0.3, "alpha": 1e-13}), DPO, None, 1e-11),
    (("f-dpo-alpha", {"beta": 0.3, "alpha": 1 - 1e-15}), ("f-dpo-forward-kl", {"beta": 0.3}), None, 1e-11),
    (
        ("dpo-gamma", {"beta": 0.24, "reference_strength": 1.25}),
        ("h-dpo", {"beta": 0.3, "alpha": 0.8}),
        None,
        1e-12,
    ),
    (
        ("flex-dpo", {"beta": 0.4, "beta_rejected": 0.3}),
        ("dpo-shift", {"beta": 0.4, "rejected_factor": 0.75}),
        None,
        1e-12,
    ),
    (
        ("exo", {"beta": 0.3, "label_smoothing": E}),
        ("reward-aware-forward", {"beta": 0.3, "eta": 1.0}),
        SAID,
        1e-12,
    ),
    (("sppo-hard", {"beta": 0.1}), ("sppo", {"beta": 0.1}), ONE_SIDED, 1e-12),
]


def told(named: Named, scores: PairScores | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses and slopes of the batch, by these scores where there are any."""
    policy = BATCH.policy()
    out = build_objective(named[0], **named[1])(
        policy,
        PairLogps(*BATCH.both("b")),
        torch.cat(BATCH.both("n")).long(),
        scores=scores or PairScores(*BATCH.both("s")),
    )
    return out.losses, slopes(out, policy)


@pytest.mark.parametrize(("one", "other", "scores", "rtol"), ALIKE, ids=[f"{x[0]}-{y[0]}" for x, y, *_ in ALIKE])
def test_limits_in_which_one_loss_is_another(one: Named, other: Named, scores: PairScores | None, rtol: float) -> None:
    (losses, ours), (expected, theirs) = told(one, scores), told(other, scores)
    for mine, yours in zip((losses, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(mine, yours, rtol=rtol, atol=1e-13)


def test_the_backward_kl_to_soft_labels_is_cdpo_less_the_labels_entropy() -> None:
    losses, ours = told(("reward-aware-backward", {"beta": 0.3, "eta": 1.0}), SAID)
    smoothed, theirs = told(("cdpo", {"beta": 0.3, "label_smoothing": E}), None)
    entropy = -E * math.log(E) - (1 - E) * math.log(1 - E)
    torch.testing.assert_close(losses, smoothed - entropy, rtol=1e-11, atol=1e-12)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-11, atol=1e-13)


def at_margins(name: str, margins: Tensor, ties: bool = False, **parameters: float) -> tuple[Tensor, Tensor]:
    """Losses of chosen log-ratios, the rejected ones 0, and their slopes."""
    policy = PairLogps(margins.clone().requires_grad_(), torch.zeros_like(margins).requires_grad_())
    out = at(build_objective(name, **parameters), policy, ties)
    return out.losses.detach(), slopes(out, policy)[0]


def test_the_three_outcomes_of_todo_have_probabilities_that_sum_to_1() -> None:
    z = torch.linspace(-40, 40, 161, dtype=torch.float64)
    for alpha in (1e-3, 0.5, 5.0):
        better, worse, tied = (
            at_margins("todo", where, ties, beta=1.0, alpha=alpha)[0]
            for where, ties in ((z, False), (-z, False), (z, True))
        )
        total = torch.exp(-better) + torch.exp(-worse) + torch.exp(-tied)
        torch.testing.assert_close(total, torch.ones_like(z), rtol=1e-12, atol=0)
    assert at_margins("todo", torch.zeros(1), True, beta=1.0, alpha=0.5)[1].item() == 0  # a tie is best where it is


@pytest.mark.parametrize(
    ("name", "parameters", "best"),
    [
        ("ipo-sum", {"tau": 0.1}, 5.0),
        ("ipo", {"tau": 0.1}, 35.0),  # of answers of 7 tokens
        ("exo", {"beta": 1.0, "label_smoothing": 1e-3}, math.log(999)),
        ("reward-aware-squared", {"beta": 0.2, "eta": 2.0}, 7.0),  # (0.9 - 0.2) * 2 / 0.2
        ("reward-aware-backward", {"beta": 0.2, "eta": 2.0}, 7.0),
        ("reward-aware-forward", {"beta": 0.2, "eta": 2.0}, 7.0),
        ("sppo-hard", {"beta": 0.1}, 5.0),
    ],
)
def test_a_loss_with_a_target_is_lowest_there(name: str, parameters: dict[str, float], best: float) -> None:
    where = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64)
    losses, slope = at_margins(name, where, **parameters)
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]
    assert slope[0] < 0 < slope[2]
    assert slope[1].abs() < 1e-12


def test_a_hinge_teaches_nothing_once_its_margin_is_there() -> None:
    margins = torch.tensor([0.0, 0.99, 1.01, 50.0], dtype=torch.float64)
    assert at_margins("hinge", margins, beta=1.0)[1].tolist() == [-1, -1, 0, 0]
    assert at_margins("repo", 3.5 * margins, target_margin=0.5)[1].tolist() == [-1 / 7, -1 / 7, 0, 0]


def test_repo_is_the_limit_of_simpo_over_beta() -> None:
    losses, ours = told(("repo", {"target_margin": 0.5}), None)
    steep, theirs = told(("simpo", {"beta": 1e8, "gamma_beta_ratio": 0.5}), None)
    torch.testing.assert_close(losses, steep / 1e8, rtol=1e-6, atol=1e-7)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours / 1e8, rtol=1e-6, atol=1e-12)


def test_discopop_starts_on_a_slope_that_lowers_the_margin() -> None:
    """At log-odds of 0 its slope is (1 - ln 2) / (4 tau) - 3/4, positive below tau = 0.102: what its page says."""
    for tau in (0.05, 0.5):
        slope = at_margins("discopop", torch.zeros(1, dtype=torch.float64), beta=1.0, tau=tau)[1].item()
        assert slope == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75, rel=1e-12)
    assert build_objective("discopop").weights(torch.zeros(1)).item() < 0
