"""The registry: every objective is what its entry says, and configs, Python's door and refusals follow from it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lorafocal.arguments import FocalPOConfig
from lorafocal.config import check_config, known_keys, training_arguments
from lorafocal.errors import InputError
from lorafocal.objectives import (
    OBJECTIVES,
    PARAMETERS,
    PairInputs,
    PairLogps,
    Parameter,
    build_objective,
    python_name,
)
from lorafocal.objectives.objective import _asking
from lorafocal.objectives.pairwise import dpo_weight
from tests.objectives.logps import made_up, some, told
from tests.test_config import VALUES, mistakes

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
INPUTS = tuple(spec.name for spec in fields(PairInputs) if spec.name not in ("policy", "num_groups"))
OF_TOKENS = {
    "draws": "draws",
    "guide_tokens": "guide",
    "differs": "differs",
}  # what token weights are told, and entries


def function_of(place):
    if callable(place):
        return place
    file, _, name = place.partition(".")
    return getattr(import_module(f"lorafocal.objectives.{file}"), name)


def parameters_of(place) -> set[str]:
    return set(inspect.signature(function_of(place)).parameters) if place else set()


def given(name: str, policy: PairLogps, against: PairLogps, /, **changes):
    """The objective's losses of the five made-up pairs."""
    return build_objective(name).of(replace(told(OBJECTIVES[name], policy, against), **changes))


def refuses(parameter: Parameter, value: float) -> bool:
    try:
        parameter.check(value)
    except InputError:
        return True
    return False


def section(name: str, **values: object) -> dict[str, object]:
    """A config's values with this objective."""
    stated = {key: of.default for key, of in OBJECTIVES[name].parameters.items() if of.stated}
    guide = {"guide": "earlier/adapter"} if OBJECTIVES[name].guide else {}
    reference = {"kind": "disabled_adapter", **guide} if OBJECTIVES[name].reference else None
    return {**VALUES, "objective": {"name": name, **stated, **values}, "reference": reference}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_entry_names_functions_that_take_together_exactly_what_it_says(name):
    entry = OBJECTIVES[name]
    assert (entry.odds is None) != (entry.loss is None)
    settings = {python_name(key) for key in entry.parameters}
    link = parameters_of(entry.link) if entry.odds else set()
    constants = link - settings if entry.constants else set()
    taken = set().union(link, *map(parameters_of, (entry.odds, entry.constants, entry.beside, entry.over, entry.loss)))
    of_tokens = parameters_of(entry.token_weights)
    taken |= (of_tokens & settings) | {OF_TOKENS[key] for key in OF_TOKENS.keys() & of_tokens}
    taken |= {"gamma"} if entry.factor else set()
    needs = {key for key in (*INPUTS, "state", "differs") if getattr(entry, key)}
    assert taken - {"policy", "log_odds", "losses", "num_groups"} - constants == needs | settings


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.whole_step])
def test_over_a_step_slopes_go_to_log_probs_of_answers_alone(name):
    """Its second pass knows of no other way to the weights."""
    entry = OBJECTIVES[name]
    assert not any((entry.divergences, entry.token_weights, entry.guide))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_entry_does_not_need_moves_nothing(name):
    entry = OBJECTIVES[name]
    policy, reference = made_up()
    with torch.no_grad():
        whole = given(name, policy, reference)
        left_out = {key: None for key in INPUTS if not getattr(entry, key)}
        bare = given(name, policy, reference, **left_out)
        assert all(torch.equal(one, other) for one, other in zip(whole[:3], bare[:3], strict=True))
        if not entry.rejected:
            moved = given(name, PairLogps(policy.chosen, policy.rejected - 5), reference)
            assert torch.equal(moved.losses, whole.losses)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_are_finite_and_differentiable_and_rewards_are_detached(name, dtype):
    policy, reference = made_up(dtype=dtype)
    out = given(name, policy, reference)
    assert out.losses.shape == (5,)
    assert out.losses.dtype == dtype
    assert torch.isfinite(out.losses).all()
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    out.losses.sum().backward()
    for side in policy[: 1 + OBJECTIVES[name].rejected]:
        assert torch.isfinite(side.grad).all()
        assert side.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if not entry.whole_step])
def test_a_pair_s_loss_does_not_depend_on_who_shares_its_pack(name):
    inputs = told(OBJECTIVES[name], *made_up())
    objective = build_objective(name)
    with torch.no_grad():
        whole = objective.of(inputs).losses
        for pair in range(5):
            torch.testing.assert_close(objective.of(some(inputs, [pair])).losses[0], whole[pair], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.whole_step])
def test_the_order_of_a_step_s_pairs_changes_no_loss(name):
    inputs = told(OBJECTIVES[name], *made_up())
    objective, order = build_objective(name), [3, 0, 4, 2, 1]
    with torch.no_grad():
        whole, turned = objective.of(inputs), objective.of(some(inputs, order))
    torch.testing.assert_close(turned.losses, whole.losses[order], rtol=1e-11, atol=1e-14)
    for key, value in (whole.state or {}).items():
        torch.testing.assert_close(turned.state[key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.state])
def test_a_state_is_of_float64_and_holds_no_graph(name):
    state = given(name, *made_up(dtype=torch.float32)).state
    assert state
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in state.values())


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.bradley_terry])
def test_weights_are_the_slope_of_the_preference_term_over_its_log_odds(name):
    """The policy's log-probs move log-odds and what stands beside: the latter is left out by its own weight, 0."""
    entry = OBJECTIVES[name]
    beside = {"nll_weight": 0.0} if "nll_weight" in entry.parameters else {}
    objective = build_objective(name, **beside)
    inputs = told(entry, *made_up())
    rejected = inputs.policy.rejected
    out = objective.of(inputs)
    assert not out.log_odds.requires_grad
    [slope] = torch.autograd.grad(out.losses.sum(), rejected)
    odds = _asking(entry.odds, objective.parameters)(inputs.policy, **inputs.asked(), state={})
    [log_odds_a_nat] = torch.autograd.grad(odds.log_odds.sum(), rejected)
    weights = objective.weights(out.log_odds, *out.constants) * (1.0 if out.scale is None else out.scale)
    torch.testing.assert_close(-slope, weights * log_odds_a_nat, rtol=1e-9, atol=1e-12)
    assert not weights.requires_grad
    assert weights.dtype == torch.float64


def test_dpo_s_weights_are_its_own():
    margins = torch.linspace(-600, 600, 241)
    torch.testing.assert_close(
        build_objective("dpo").weights(margins), dpo_weight(margins.double()), rtol=1e-12, atol=0
    )


def test_values_are_checked_and_names_known():
    for name, values, why in (
        ("focalpo", {"gamma": 1.5}, r"1\.4427"),
        ("focal-hard", {"gamma": -0.1}, "gamma"),
        ("dpo", {"beta": 0.0}, "beta"),
        ("odpo", {"alpha": -1.0}, "alpha"),
        ("kto", {"desirable_weight": 0}, "desirable_weight"),
        ("kto", {"undesirable_weight": float("nan")}, "undesirable_weight"),
        ("orpo", {"lambda": 0.0}, "lambda is 0.0"),
        ("simpo", {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
        ("simpo", {"beta": True}, "beta"),
        ("focalpo-eq3", {"gamma": 1.1}, "gamma is 1.1"),
        ("focalpo-detached", {"gamma": -0.1}, "gamma"),
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("robust-dpo", {"label_smoothing": -0.1}, "label_smoothing"),
        ("h-dpo", {"alpha": 0}, "alpha"),
        ("dpo-shift", {"rejected_factor": 1.01}, "rejected_factor"),
        ("dpo-shift", {"rejected_factor": 0}, "rejected_factor"),
        ("length-dpo", {"alpha": -0.01}, "alpha"),
        ("alphapo", {"alpha": float("inf")}, "alpha"),
        ("cpo", {"nll_weight": -1}, "nll_weight"),
        ("omni-dpo", {"eta": -1}, "eta"),
        ("omni-dpo", {"tau_ref": "1"}, "tau_ref"),
        ("omni-dpo", {"tau_good": float("nan")}, "tau_good"),
        ("dr-dpo", {"beta_prime": 0}, "beta_prime"),
        ("beta-dpo", {"sensitivity": -0.1}, "sensitivity"),
        ("beta-dpo", {"filtered_share": 1}, "filtered_share is 1"),
        ("beta-dpo", {"momentum": 1.0}, "momentum is 1.0"),
        ("gamma-po", {"tau": 0}, "tau"),
        ("gamma-po", {"gamma_beta_ratio": -1}, "gamma_beta_ratio"),
        ("group-dpo", {"eta": -0.01}, "eta"),
        ("relative-dpo", {"tau": 0.0}, "tau"),
        ("relative-dpo-diagonal", {"diagonal_weight": 1.1}, "diagonal_weight is 1.1"),
        ("mpo", {"alpha": -1}, "alpha"),
        ("ppo", {}, "not known"),
    ):
        with pytest.raises(InputError, match=why):
            build_objective(name, **values)
    assert build_objective("focal-hard", gamma=2.0).parameters["gamma"] == 2.0  # FocalPO's own bound is not its
    assert (
        build_objective("orpo", lambda_=0.3).parameters
        == {"lambda": 0.3}
        == dict(build_objective("orpo", **{"lambda": 0.3}).parameters)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_config_has_an_objective_s_own_parameters_with_their_defaults_and_no_others(name):
    entry = OBJECTIVES[name]
    config = check_config(section(name))
    assert config.objective.parameters == {key: of.default for key, of in entry.parameters.items()}
    assert config.objective.model_dump() == {"name": name, **config.objective.parameters}
    arguments = training_arguments(config)
    assert {key: arguments[python_name(key)] for key in entry.parameters} == config.objective.parameters
    for key in PARAMETERS.keys() - entry.parameters.keys():
        assert f"objective.{key}: {name} has none and would ignore it" in mistakes(section(name, **{key: 0.5}))
    for key, of in entry.parameters.items():
        if of.stated:
            assert f"objective.{key}: missing; it has no default" in mistakes(section(name, **{key: None}))
        if refuses(of, -1.0):
            assert f"objective.{key}: {key} is" in mistakes(section(name, **{key: -1.0}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_reference_is_asked_for_where_there_is_one_and_refused_elsewhere(name):
    values = section(name)
    if OBJECTIVES[name].reference:
        assert "reference: missing" in mistakes({**values, "reference": None})
    else:
        refused = mistakes({**values, "reference": {"kind": "disabled_adapter"}})
        assert f"reference: {name} compares with no reference" in refused


def test_keys_of_the_config_and_fields_of_python_s_door_are_the_registry_s():
    assert {key.partition(".")[2] for key in known_keys() if key.startswith("objective.")} == {
        *("name", "focal.form", "focal.gamma", "guard"),
        *PARAMETERS,
    }
    fields_there = {spec.name: spec for spec in fields(FocalPOConfig)}
    for key, text in PARAMETERS.items():
        assert fields_there[python_name(key)].metadata["help"] == text
    for name, entry in OBJECTIVES.items():
        for key in entry.parameters:
            assert name in PARAMETERS[key]


def test_python_s_door_settles_defaults_and_refuses_strays(tmp_path):
    args = FocalPOConfig(str(tmp_path), objective="orpo", lambda_=0.2, use_cpu=True)
    assert (args.lambda_, args.beta, args.reference) == (0.2, None, None)
    assert args.build_objective().parameters == {"lambda": 0.2}
    for settings, why in (
        ({"objective": "orpo", "beta": 0.1}, "orpo has no beta"),
        ({"objective": "simpo", "reference": "disabled_adapter"}, "simpo has no reference"),
        ({"objective": "dpo", "lambda_": 0.1}, "dpo has no lambda_"),
        ({"objective": "kto", "desirable_weight": 0.0}, "desirable_weight is 0.0"),
    ):
        with pytest.raises(InputError, match=why):
            FocalPOConfig(str(tmp_path), use_cpu=True, **settings)


def test_the_page_has_every_objective_with_its_parameters():
    table, _, _ = PAGE.read_text().partition("## ")
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)) == sorted(OBJECTIVES)
    for name, entry in OBJECTIVES.items():
        [row] = re.findall(rf"^\| `{name}` \|.*$", table, re.MULTILINE)
        assert all(f"`{key}`" in row for key in entry.parameters)
        assert ("no reference" in row) != entry.reference
        assert ("scores" in row) == (entry.scores is not None)


def test_one_more_objective_is_one_entry():
    """In a fresh interpreter, before anything has read the registry; and none of this loads torch."""
    code = """
import sys
from lorafocal import bounds, objectives
own = objectives.Parameter(0.5, bounds.check_hard_gamma, "how much")
objectives.OBJECTIVES["new"] = objectives.Entry({"zeta": own}, loss="pairwise.dpo", reference=False)
objectives.PARAMETERS |= objectives._parameters()
from lorafocal.config import known_keys
from lorafocal.schema import Objective
assert Objective(name="new").model_dump() == {"name": "new", "zeta": 0.5}
assert "objective.zeta" in known_keys()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
