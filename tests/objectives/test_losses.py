"""ODPO, the hard emphasis, KTO, ORPO and SimPO: their papers' formulas in float64, their limits, and TRL's own."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lorafocal.objectives import PairLogps, PairScores, build_objective, dpo
from lorafocal.objectives.focal import hard_loss, identity_loss
from lorafocal.objectives.kto import kto
from lorafocal.objectives.orpo import log_odds, orpo
from tests.objectives.logps import LENGTHS, SCORES, made_up

GAMMAS = [0.0, 0.05, 1.0, 3.0]


def composed(name: str):
    """An objective of the registry as a function of what it needs and its parameters."""

    def loss(policy, reference=None, *, lengths=None, scores=None, **parameters):
        return build_objective(name, **parameters)(policy, reference, lengths, scores=scores)

    return loss


focal_hard, odpo, simpo, alphapo, cpo = map(composed, ("focal-hard", "odpo", "simpo", "alphapo", "cpo"))


def pairs(policy: PairLogps, reference: PairLogps) -> list[tuple[float, ...]]:
    """Five pairs as plain numbers: chosen, rejected, and the reference's two."""
    return list(zip(*(side.tolist() for side in (*policy, *reference)), strict=True))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def same(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


# --- hard emphasis ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
def test_hard_emphasis_is_the_focal_loss_of_detection_on_the_margin(gamma):
    policy, reference = made_up()
    margins = [0.3 * ((c - rc) - (r - rr)) for c, r, rc, rr in pairs(policy, reference)]
    expected = [-((1 - sigmoid(z)) ** gamma) * math.log(sigmoid(z)) for z in margins]
    same(focal_hard(policy, reference, beta=0.3, gamma=gamma).losses, expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_hard_emphasis_weighs_by_its_closed_form_and_never_turns(gamma):
    margin = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(hard_loss(margin, gamma=gamma).sum(), margin)
    p = torch.sigmoid(margin.detach())
    weight = (1 - p) ** gamma * ((1 - p) - gamma * p * p.log())
    torch.testing.assert_close(-slope, weight, rtol=1e-6, atol=1e-15)
    assert (-slope >= 0).all()
    if gamma:  # against DPO: hopeless pairs keep their weight, solved ones lose it
        ratio = -slope / torch.sigmoid(-margin.detach())
        assert ratio.max() > 1
        assert ratio[0] == pytest.approx(1)
        assert ratio[-1] < 0.06


def test_hard_emphasis_without_gamma_is_dpo_bit_for_bit_and_starts_at_the_identity_loss():
    policy, reference = made_up(dtype=torch.float32)
    plain, hard = (loss(policy, reference, beta=0.1) for loss in (dpo, partial(focal_hard, gamma=0.0)))
    assert torch.equal(plain.losses, hard.losses)
    same_model = focal_hard(policy, PairLogps(*(side.detach() for side in policy)), beta=0.1, gamma=1.0)
    assert float(same_model.losses.sum().detach()) == pytest.approx(5 * identity_loss(1.0), rel=1e-6)


@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
def test_hard_emphasis_is_finite_far_out_in_float32(margin):
    z = torch.tensor([margin], requires_grad=True)
    loss = hard_loss(z, gamma=1.0)
    loss.backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(z.grad).all()
    assert float(loss.detach()) == pytest.approx(max(-margin, 0.0))


# --- ODPO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_odpo_asks_for_the_log_of_the_score_gap(alpha):
    policy, reference = made_up()
    gaps = (SCORES.chosen - SCORES.rejected).tolist()
    margins = [0.3 * ((c - rc) - (r - rr)) for c, r, rc, rr in pairs(policy, reference)]
    expected = [-math.log(sigmoid(z - alpha * math.log(gap))) for z, gap in zip(margins, gaps, strict=True)]
    found = odpo(policy, reference, scores=SCORES, beta=0.3, alpha=alpha)
    torch.testing.assert_close(found.losses, torch.tensor(expected).double(), rtol=1e-6, atol=0)  # fp32 scores
    same(found.margins, margins)  # rewards stay the model's own


def test_odpo_is_dpo_without_alpha_and_at_a_gap_of_one():
    policy, reference = made_up()
    one = PairScores(torch.full((5,), 3.0), torch.full((5,), 2.0))
    plain = dpo(policy, reference, beta=0.3)
    for found in (
        odpo(policy, reference, scores=SCORES, beta=0.3, alpha=0.0),
        odpo(policy, reference, scores=one, beta=0.3, alpha=1.0),
    ):
        assert torch.equal(found.losses, plain.losses)


def test_odpo_s_scores_are_constants_and_do_not_widen_the_loss():
    policy, reference = made_up(dtype=torch.float32)
    scores = PairScores(*(side.double().requires_grad_() for side in SCORES))
    found = odpo(policy, reference, scores=scores, beta=0.3, alpha=1.0)
    assert found.losses.dtype == torch.float32
    assert torch.autograd.grad(found.losses.sum(), scores.chosen, allow_unused=True) == (None,)


# --- KTO ----------------------------------------------------------------------------------------------------


def kto_by_hand(policy: PairLogps, reference: PairLogps, beta: float, desirable: float, undesirable: float):
    rows = pairs(policy, reference)
    of_chosen = max(0.0, sum(c - rc for c, _, rc, _ in rows) / len(rows))
    of_rejected = max(0.0, sum(r - rr for _, r, _, rr in rows) / len(rows))
    return [
        desirable / 2 * (1 - sigmoid(beta * (c - rc - of_rejected)))
        + undesirable / 2 * (1 - sigmoid(beta * (of_chosen - (r - rr))))
        for c, r, rc, rr in rows
    ]


@pytest.mark.parametrize("seed", range(4))  # of either sign: an estimate of a KL is cut at 0
def test_kto_values_each_answer_against_the_step_s_estimate_of_the_other_kind(seed):
    policy, reference = made_up(seed)
    found = kto(policy, reference, beta=0.1, desirable_weight=1.3, undesirable_weight=0.7)
    same(found.losses, kto_by_hand(policy, reference, 0.1, 1.3, 0.7))


def test_kto_s_reference_points_are_not_differentiated():
    """Its slopes are those of each answer's own value: the points, in which all answers are, are held."""
    policy, reference = made_up(1)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    slopes = torch.autograd.grad(kto(policy, reference, beta=0.1, **weights).losses.sum(), policy)
    gains = [side.detach() - of for side, of in zip(policy, reference, strict=True)]
    points = [0.1 * gain.mean().clamp(min=0) for gain in gains]
    won = torch.sigmoid(0.1 * gains[0] - points[1])
    lost = torch.sigmoid(points[0] - 0.1 * gains[1])
    torch.testing.assert_close(slopes[0], -0.1 * 1.3 / 2 * won * (1 - won), rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes[1], 0.1 * 0.7 / 2 * lost * (1 - lost), rtol=1e-12, atol=0)


def test_kto_starts_at_half_the_mean_weight():
    policy, _ = made_up()
    reference = PairLogps(*(side.detach() for side in policy))
    found = kto(policy, reference, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    same(found.losses, [0.5 * (1.5 + 0.5) / 2] * 5)


# --- ORPO ---------------------------------------------------------------------------------------------------


def test_orpo_is_the_likelihood_and_the_odds_ratio_of_mean_log_probs():
    policy, _ = made_up()
    lengths = LENGTHS.tolist()
    expected = []
    for place, (chosen, rejected) in enumerate(zip(*(side.tolist() for side in policy), strict=True)):
        c, r = chosen / lengths[place], rejected / lengths[place + 5]
        odds = math.exp(c) / (1 - math.exp(c)), math.exp(r) / (1 - math.exp(r))
        expected.append(-c - 0.3 * math.log(sigmoid(math.log(odds[0] / odds[1]))))
    same(orpo(policy, lengths=LENGTHS, lambda_=0.3).losses, expected)


def test_orpo_without_the_odds_ratio_is_supervised_tuning():
    policy, _ = made_up()
    near = orpo(policy, lengths=LENGTHS, lambda_=1e-12)
    torch.testing.assert_close(near.losses, build_objective("sft")(policy, None, LENGTHS).losses, rtol=1e-10, atol=0)


def test_log_odds_keep_their_digits_at_both_ends_and_stay_finite_at_probability_one():
    logps = torch.tensor([-1e-6, -1e-3, -math.log(2), -1.0, -30.0, -700.0], dtype=torch.float64)
    exact = [-1e-6 - math.log(-math.expm1(-1e-6)), -1e-3 - math.log(-math.expm1(-1e-3)), 0.0]
    exact += [-1 - math.log1p(-math.exp(-1)), -30.0, -700.0]
    torch.testing.assert_close(log_odds(logps), torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    for dtype in (torch.float32, torch.float64):
        certain = torch.tensor([0.0, -1e-30, -1e-9, -1e3], dtype=dtype, requires_grad=True)
        log_odds(certain).sum().backward()
        assert torch.isfinite(log_odds(certain)).all()
        assert torch.isfinite(certain.grad).all()


def test_log_odds_rise_everywhere():
    logps = -torch.logspace(-6, 3, 4000, dtype=torch.float64)
    assert (log_odds(logps).diff() < 0).all()


# --- SimPO --------------------------------------------------------------------------------------------------


def test_simpo_ranks_by_mean_log_probs_past_a_target():
    policy, _ = made_up()
    lengths = LENGTHS.tolist()
    margins = [
        2.5 * (chosen / lengths[place] - rejected / lengths[place + 5])
        for place, (chosen, rejected) in enumerate(zip(*(side.tolist() for side in policy), strict=True))
    ]
    found = simpo(policy, lengths=LENGTHS, beta=2.5, gamma_beta_ratio=0.55)
    same(found.losses, [-math.log(sigmoid(z - 2.5 * 0.55)) for z in margins])
    same(found.margins, margins)  # the target is the loss's, not the reward's


def test_simpo_on_one_token_without_a_target_is_dpo_against_a_reference_that_says_nothing():
    policy, _ = made_up()
    nothing = PairLogps(torch.zeros(5).double(), torch.zeros(5).double())
    found = simpo(policy, lengths=torch.ones(10), beta=2.0, gamma_beta_ratio=0.0)
    assert torch.equal(found.losses, dpo(policy, nothing, beta=2.0).losses)


# --- TRL ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_has_the_same_orpo_simpo_alphapo_and_preference_term_of_cpo(monkeypatch):
    """Its loss functions on the same mean log-probs; its trainers' own bookkeeping is left out."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    policy, _ = made_up(dtype=torch.float32)
    chosen, rejected = LENGTHS.split(5)
    means = [(logps / lengths).detach() for logps, lengths in zip(policy, (chosen, rejected), strict=True)]
    here = SimpleNamespace(device="cpu")
    theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.1, accelerator=here), *means)
    ours = orpo(policy, lengths=LENGTHS, lambda_=0.1)
    torch.testing.assert_close(ours.losses, -means[0] - theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.margins, theirs[1] - theirs[2], rtol=1e-5, atol=1e-6)
    sums = [side.detach() for side in policy]
    for ours, theirs, logps in (
        (
            simpo(policy, lengths=LENGTHS, beta=2.5, gamma_beta_ratio=0.55),
            {"alpha": 0.0, "beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.375},
            means,
        ),
        (
            alphapo(policy, lengths=LENGTHS, beta=2.5, gamma_beta_ratio=0.04, alpha=0.25),
            {"alpha": 0.25, "beta": 2.5, "loss_type": "simpo", "simpo_gamma": 0.1},
            means,
        ),
        (
            cpo(policy, lengths=LENGTHS, beta=0.3, nll_weight=0.0),
            {"alpha": 0.0, "beta": 0.3, "loss_type": "sigmoid"},
            sums,
        ),
    ):
        trainer = SimpleNamespace(**theirs, label_smoothing=0.0, accelerator=here)
        losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *logps)
        torch.testing.assert_close(ours.losses, losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.margins, chosen_rewards - rejected_rewards, rtol=1e-5, atol=1e-5)


def test_cpo_s_likelihood_is_in_nats_a_token():
    """TRL's trainer: the mean cross-entropy over the chosen answer's tokens."""
    policy, _ = made_up()
    with_it, without = (cpo(policy, lengths=LENGTHS, beta=0.3, nll_weight=weight).losses for weight in (0.7, 0.0))
    same(
        with_it - without, [-0.7 * logp / n for logp, n in zip(policy.chosen.tolist(), LENGTHS.tolist(), strict=False)]
    )
