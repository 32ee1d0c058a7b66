"""The focal factor around other losses: its forms, what it leaves alone, who takes it, and the guard."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, build_objective, objective_from
from lorafocal.objectives.factor import FORMS, in_words, refusal
from lorafocal.objectives.focal import focal_weight, turning_point
from tests.objectives.logps import LENGTHS, SCORES, made_up

OWN_INPUTS = "whole_step", "divergences", "others", "guide"  # whose tests stand with their families
WRAPPED = [
    name
    for name, entry in OBJECTIVES.items()
    if refusal(name, entry) is None and not any(getattr(entry, each) for each in OWN_INPUTS)
]
SMOOTHED = ("cdpo", "robust-dpo")
WITHOUT_ODDS = ("sft", "kto", "orpo", "repo", "ipo", "ipo-sum", "hinge", "sppo", "sppo-hard")
WEIGHTED = ("omni-dpo", "wpo", "todo", "reward-aware-squared", "reward-aware-backward", "reward-aware-forward")
FAR = torch.cat((torch.linspace(-1e4, 1e4, 2001), torch.linspace(-200, 200, 4001)))
NEAR = torch.linspace(-60, 30, 1801, dtype=torch.float64)


def around(name: str, form: str, gamma: float, **more):
    return build_objective(name, focal={"form": form, "gamma": gamma}, **more)


def values_and_slopes(objective, seed: int = 0) -> list[torch.Tensor]:
    policy, reference = made_up(seed, dtype=torch.float32)
    out = objective(policy, reference, LENGTHS, scores=SCORES)
    return [out.losses.detach(), out.log_odds, *torch.autograd.grad(out.losses.sum(), policy)]


def slope(losses_of, log_odds: torch.Tensor) -> torch.Tensor:
    log_odds = log_odds.detach().clone().requires_grad_()
    return torch.autograd.grad(losses_of(log_odds).sum(), log_odds)[0]


def fits(name: str, form: str) -> bool:
    return form != "eq3" or OBJECTIVES[name].logistic


def test_every_loss_with_a_bradley_terry_form_takes_a_factor():
    assert set(WRAPPED) >= {
        *("dpo", "cdpo", "robust-dpo", "h-dpo", "dpo-shift", "odpo", "simpo", "alphapo", "length-dpo", "dpo-norm"),
        *("cpo", "irpo", "regularised-rpo", "anchored-dpo", "dpo-gamma", "flex-dpo", "dpop", "exo", "discopop"),
        *("mappo", "f-dpo-forward-kl", "f-dpo-js", "f-dpo-alpha"),
    }
    for name, entry in OBJECTIVES.items():
        if entry.factor is not None or entry.constants is not None or not entry.bradley_terry:
            assert refusal(name, entry)


@pytest.mark.row("64")
@pytest.mark.parametrize("name", WRAPPED)
def test_gamma_zero_is_the_loss_itself_bit_for_bit_in_value_and_gradient(name):
    for seed in range(4):
        plain = values_and_slopes(build_objective(name), seed)
        for form in filter(lambda form: fits(name, form), FORMS):
            assert all(map(torch.equal, values_and_slopes(around(name, form, 0.0), seed), plain)), form


@pytest.mark.parametrize(
    ("name", "form"),
    [("focalpo", "p_gamma"), ("focalpo-eq3", "eq3"), ("focal-hard", "hard"), ("focalpo-detached", "detached")],
)
def test_the_paper_s_losses_are_dpo_with_a_factor_bit_for_bit(name, form):
    own, wrapped = build_objective(name, beta=0.3, gamma=0.4), around("dpo", form, 0.4, beta=0.3)
    assert all(map(torch.equal, values_and_slopes(own), values_and_slopes(wrapped)))
    assert own.turning_point == wrapped.turning_point


def test_a_factor_is_of_the_loss_s_own_log_odds_target_margins_included():
    simpo = build_objective("simpo", beta=2.0, gamma_beta_ratio=1.5)
    policy, _ = made_up()
    plain = simpo(policy, lengths=LENGTHS)
    found = around("simpo", "p_gamma", 0.4, beta=2.0, gamma_beta_ratio=1.5)(policy, lengths=LENGTHS)
    p = torch.sigmoid(plain.margins - 3.0)
    torch.testing.assert_close(found.losses.detach(), p**0.4 * plain.losses.detach(), rtol=1e-12, atol=0)
    assert torch.equal(found.log_odds, plain.log_odds)
    assert torch.equal(found.margins, plain.margins)


def test_what_stands_beside_a_preference_term_has_no_factor_and_no_guard():
    policy, _ = made_up()
    with_it, without = (
        around("cpo", "p_gamma", 0.4, beta=0.3, nll_weight=weight, guard="clip")(policy, lengths=LENGTHS).losses
        for weight in (1.0, 0.0)
    )
    torch.testing.assert_close(with_it - without, -policy.chosen / LENGTHS[:5], rtol=1e-12, atol=1e-12)


@pytest.mark.row("11")
@pytest.mark.parametrize("gamma", [0.01, 0.05, 0.5, 0.99, 1.0])
def test_eq3_is_finite_and_exact_at_every_margin(gamma):
    """Against -(1-p)^-gamma log p with p told by exp(-z) alone, where that is exact: from margin 40 on in float64."""
    eq3 = around("dpo", "eq3", gamma).preference
    losses, slopes = eq3(FAR), slope(eq3, FAR)
    assert losses.isfinite().all()
    assert slopes.isfinite().all()
    z = torch.tensor([40.0, 100.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(eq3(z), torch.exp((gamma - 1) * z), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope(eq3, z), (gamma - 1) * torch.exp((gamma - 1) * z), rtol=1e-9, atol=1e-15)
    z = torch.linspace(-50, 30, 801, dtype=torch.float64)
    printed = -((1 / torch.sigmoid(-z)) ** gamma) * logsigmoid(z)
    torch.testing.assert_close(eq3(z), printed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0])
def test_eq3_weighs_by_its_closed_form_and_never_turns(gamma):
    z = torch.linspace(-60, 30, 901, dtype=torch.float64)
    p = torch.sigmoid(z)
    weight = torch.sigmoid(-z) ** -gamma * (torch.sigmoid(-z) + gamma * p * logsigmoid(z))
    objective = build_objective("focalpo-eq3", gamma=gamma)
    torch.testing.assert_close(objective.weights(z), weight, rtol=1e-3 if gamma == 1 else 1e-9, atol=1e-15)
    assert (objective.weights(z) >= -1e-15).all()
    assert not objective.turned(z).any()


@pytest.mark.row("64")
def test_the_detached_form_has_the_value_of_focalpo_and_its_own_weight():
    detached, focalpo = (build_objective(name, gamma=0.4) for name in ("focalpo-detached", "focalpo"))
    assert torch.equal(values_and_slopes(detached)[0], values_and_slopes(focalpo)[0])
    weight = torch.sigmoid(-NEAR) * torch.exp(0.4 * logsigmoid(NEAR))
    torch.testing.assert_close(detached.weights(NEAR), weight, rtol=1e-12, atol=1e-300)
    peak = NEAR[detached.weights(NEAR).argmax()]
    assert float(peak) == pytest.approx(math.log(0.4), abs=0.05)


@pytest.mark.row("11")
@pytest.mark.parametrize("name", ["dpo", *SMOOTHED])
@pytest.mark.parametrize("form", ["p_gamma", "hard", "detached"])
def test_every_factor_around_every_link_is_finite_far_out_in_float32(name, form):
    for gamma in (0.05, 1.0):
        preference = around(name, form, gamma).preference
        assert preference(FAR).isfinite().all()
        assert slope(preference, FAR).isfinite().all()


@pytest.mark.parametrize("gamma", [0.01, 0.05, 0.2, 1.0, 1.44])
def test_the_turning_point_of_the_logistic_loss_is_the_closed_form(gamma):
    objective = around("simpo", "p_gamma", gamma)
    assert objective.turning_point == pytest.approx(turning_point(gamma), rel=1e-9)
    assert torch.equal(objective.turned(NEAR), focal_weight(NEAR, gamma=gamma) < 0)
    assert objective.turned(torch.tensor([-1e5, -1e30])).all()  # where every float of the gradient is 0


@pytest.mark.parametrize("name", SMOOTHED)
def test_a_smoothed_loss_turns_where_its_own_weights_change_their_sign(name):
    objective = around(name, "p_gamma", 0.5)
    turn = objective.turning_point
    below, above = objective.weights(torch.tensor([turn - 1e-3, turn + 1e-3]))
    assert below < 0 < above
    assert build_objective(name).weights(torch.tensor([turn]))[0] > 0
    assert build_objective(name).turning_point == -math.inf
    assert around(name, "hard", 0.5).turning_point == -math.inf


@pytest.mark.row("64")
@pytest.mark.parametrize("name", ["dpo", *SMOOTHED])
def test_the_guard_takes_the_gradient_of_turned_pairs_and_nothing_else(name):
    free, guarded = (around(name, "p_gamma", 0.5, guard=guard) for guard in (None, "clip"))
    turned = free.turned(NEAR)
    assert 0 < turned.double().mean() < 1
    assert torch.equal(guarded.preference(NEAR), free.preference(NEAR))
    without, with_it = (slope(objective.preference, NEAR) for objective in (free, guarded))
    assert torch.equal(with_it, torch.where(turned, 0.0, without))
    torch.testing.assert_close(guarded.weights(NEAR), -with_it, rtol=0, atol=0)
    assert torch.equal(guarded.turned(NEAR), turned)  # told all the same
    if name == "dpo":
        assert (guarded.weights(NEAR) >= 0).all()


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_an_objective_is_built_again_from_its_record(name):
    objective = build_objective(name)
    assert (
        objective_from(objective.as_dict()).as_dict() == objective.as_dict() == {"name": name, **objective.parameters}
    )
    if name in WRAPPED:
        record = around(name, "p_gamma", 0.1, guard="clip").as_dict()
        assert record["focal"] == {"form": "p_gamma", "gamma": 0.1}
        assert objective_from(record).as_dict() == record
        assert in_words(record).endswith("p_gamma 0.1, guard clip)")


def test_a_record_that_this_version_cannot_honour_is_refused():
    for record, told in (
        ({"name": "dpo", "beta": 0.1, "later": 1}, "later is not known here"),
        ({"name": "ppo"}, "'ppo' is not known"),
        ({}, "'' is not known"),
        ({"name": "dpo", "beta": 0.1, "focal": {"form": "other", "gamma": 1.0}}, "'other' is not known"),
    ):
        with pytest.raises(InputError, match=told):
            objective_from(record)


REFUSED = [
    *[(name, {"gamma": 0.1}, None, f"{name} has a factor of its own") for name in OBJECTIVES if "focal" in name],
    *[(name, {"gamma": 0.1}, None, f"{name} has no Bradley-Terry form") for name in WITHOUT_ODDS],
    *[(name, {"gamma": 0.1}, None, f"{name} has weights or targets of its own") for name in WEIGHTED],
    *[(name, {"form": "eq3", "gamma": 0.1}, None, f"eq3 does not go with {name}") for name in (*SMOOTHED, "exo")],
    ("dpo", {}, None, "focal.gamma: missing"),
    ("dpo", {"form": "eq3", "gamma": 1.01}, None, "gamma is 1.01"),
    ("dpo", {"gamma": 1.5}, None, r"1\.4427"),
    ("dpo", {"form": "hard", "gamma": -1}, None, "gamma is -1"),
    ("dpo", {"form": "soft", "gamma": 1}, None, "choose one of p_gamma, eq3, hard, detached"),
    ("dpo", {"gamma": 0.1, "power": 2}, None, "focal.power: not known"),
    ("dpo", None, "clip", "dpo has no focal factor"),
    ("dpo", {"form": "hard", "gamma": 1}, "clip", "the factor hard, which turns no gradient round"),
    ("focalpo-detached", None, "clip", "the factor detached, which turns no gradient round"),
    ("focalpo", None, "floor", "'floor' is not known"),
]


@pytest.mark.parametrize(("name", "focal", "guard", "told"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(name, focal, guard, told):
    with pytest.raises(InputError, match=told):
        build_objective(name, focal=focal, guard=guard)
