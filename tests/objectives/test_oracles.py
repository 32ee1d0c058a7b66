"""Every loss of the registry against its paper's equation, in numbers and slopes, and where careless forms break.

The oracles were written before the library's objectives had been read: see oracles.py.
"""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, PairLogps, PairLosses, build_objective
from lorafocal.objectives.objective import Objective
from tests.objectives import (
    oracles,
    oracles_of_answers,
    oracles_of_pairs,
    oracles_of_steps,
    oracles_of_tokens,
    oracles_of_vocabulary,
)
from tests.objectives.batch import GAMMAS, Batch, close, each_of, slopes
from tests.objectives.oracles import FACTORS, FOCAL, WRAPPABLE

OMNI = {"beta": 2.0, "eta": 0.7, "gamma": 3.0, "tau_ref": 0.8, "nll_weight": 0.001, "tau_good": 3.2}
# Each loss at the recipe's values and at others, limits among them. Betas keep log-odds within some tens.
CASES: list[tuple[str, dict[str, float]]] = [
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 1.5}),
    ("cdpo", {"beta": 0.4, "label_smoothing": 0.1}),
    ("cdpo", {"beta": 1.0, "label_smoothing": 0.45}),
    ("robust-dpo", {"beta": 0.4, "label_smoothing": 0.1}),
    ("robust-dpo", {"beta": 1.0, "label_smoothing": 0.4}),
    ("h-dpo", {"beta": 0.3, "alpha": 0.9}),
    ("h-dpo", {"beta": 0.3, "alpha": 1.2}),
    ("dpo-shift", {"beta": 0.5, "rejected_factor": 0.95}),
    ("dpo-shift", {"beta": 0.5, "rejected_factor": 0.5}),
    ("odpo", {"beta": 0.5, "alpha": 1.0}),
    ("odpo", {"beta": 0.5, "alpha": 0.5}),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}),
    ("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.3}),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.04, "alpha": 0.25}),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": -0.5}),
    ("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": 0.0}),
    ("length-dpo", {"beta": 0.3, "alpha": 0.01}),
    ("length-dpo", {"beta": 0.3, "alpha": 0.1}),
    ("dpo-norm", {"beta": 5.0}),
    ("cpo", {"beta": 0.1, "nll_weight": 1.0}),
    ("cpo", {"beta": 0.3, "nll_weight": 0.05}),
    ("omni-dpo", OMNI),
    ("omni-dpo", OMNI | {"beta": 5.0, "gamma": 1.0, "tau_ref": 2.0, "nll_weight": 0.2, "tau_good": 2.0}),
    ("wpo", {"beta": 0.4}),
    ("focalpo", {"beta": 0.4, "gamma": 0.05}),
    ("focalpo", {"beta": 0.4, "gamma": 0.5}),
    ("focalpo-eq3", {"beta": 0.4, "gamma": 0.05}),
    ("focalpo-eq3", {"beta": 0.4, "gamma": 1.0}),
    ("focal-hard", {"beta": 0.4, "gamma": 1.0}),
    ("focal-hard", {"beta": 0.4, "gamma": 2.5}),
    ("focalpo-detached", {"beta": 0.4, "gamma": 0.05}),
    ("focalpo-detached", {"beta": 0.4, "gamma": 1.0}),
]
SMOOTHED = ("cdpo", "robust-dpo")  # where Eq. 3's factor has no finite product
each_case = each_of(CASES)


def wrappers(name: str, gammas: dict[str, float] = GAMMAS) -> list[dict[str, Any] | None]:
    """None, and every factor that the objective takes."""
    forms = FACTORS if name in WRAPPABLE else ()
    return [None, *({"form": x, "gamma": gammas[x]} for x in forms if x != "eq3" or name not in SMOOTHED)]


BATCH = Batch(6)


def test_every_loss_of_log_odds_has_its_oracle() -> None:
    """Those of other families have files of their own beside this one."""
    assert {name for name, _ in CASES} == set(oracles.NAMES) <= OBJECTIVES.keys()


def test_every_objective_of_the_registry_has_an_oracle() -> None:
    """MODPO's is held in test_guided.py, SFT's in test_oracles_of_pairs.py, where tests of their own ask for them."""
    found = {*oracles.NAMES, *oracles_of_pairs.NAMES, "modpo", "sft"}
    for family in (oracles_of_steps.OBJECTIVES, *(of.LOSSES for of in (oracles_of_answers, oracles_of_tokens))):
        found |= family.keys()
    assert found | oracles_of_vocabulary.LOSSES.keys() == OBJECTIVES.keys()


# ---- the printed equations -------------------------------------------------------------------------------------------


@each_case
def test_value_slopes_and_log_odds_are_the_paper_s(name: str, parameters: dict[str, float]) -> None:
    for focal in wrappers(name):
        policy = BATCH.policy()
        out = BATCH(build_objective(name, focal=focal, **parameters), policy)
        expected = [oracles.value(name, pair, focal, **parameters) for pair in BATCH.pairs]
        close(out.losses, [one.loss for one in expected])
        close(out.log_odds, [one.log_odds for one in expected])
        assert out.log_odds is not None
        assert not out.log_odds.requires_grad
        gradients = [oracles.slopes(name, pair, focal, **parameters) for pair in BATCH.pairs]
        for slope, exact in zip(slopes(out, policy), zip(*gradients, strict=True), strict=True):
            close(slope, exact)


@each_case
def test_rewards_are_what_the_log_odds_are_made_of(name: str, parameters: dict[str, float]) -> None:
    out = BATCH(build_objective(name, **parameters), BATCH.policy())
    expected = [oracles.value(name, pair, **parameters).rewards for pair in BATCH.pairs]
    for rewards, exact in zip((out.chosen_rewards, out.rejected_rewards), zip(*expected, strict=True), strict=True):
        close(rewards, exact)
        assert not rewards.requires_grad


@each_case
def test_gradients_are_finite_differences(name: str, parameters: dict[str, float]) -> None:
    for focal in wrappers(name):
        objective = build_objective(name, focal=focal, **parameters)

        def losses(chosen: Tensor, rejected: Tensor, objective: Objective = objective) -> Tensor:
            return BATCH(objective, PairLogps(chosen, rejected)).losses

        check = partial(torch.autograd.gradcheck, losses, tuple(BATCH.policy()), atol=1e-7, rtol=1e-6, fast_mode=True)
        if name == "wpo" or (focal["form"] if focal else FOCAL.get(name)) == "detached":
            with pytest.raises(GradcheckError):  # a gradient that is none of its loss's: the weight is held
                check()
        else:
            check()


@each_case
def test_weights_are_the_slope_in_the_log_odds(name: str, parameters: dict[str, float]) -> None:
    """The chain rule: -dL/dz times dz/da, where nothing stands beside the preference term."""
    alone = parameters | {key: 0.0 for key in ("nll_weight",) if key in parameters}
    for focal in wrappers(name):
        objective, policy = build_objective(name, focal=focal, **alone), BATCH.policy()
        out = BATCH(objective, policy)
        weights = objective.weights(out.log_odds, *out.constants)
        assert weights.dtype == torch.float64
        odds = [oracles.slopes(name, pair, of="log_odds", **alone) for pair in BATCH.pairs]
        for slope, moves in zip(slopes(out, policy), zip(*odds, strict=True), strict=True):
            expected = -weights * torch.tensor([float(move) for move in moves], dtype=torch.float64)
            torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-13)


# ---- far out ---------------------------------------------------------------------------------------------------------

SIZES = (1e-3, 1.0, 15.0, 17.0, 50.0, 88.0, 90.0, 104.0, 400.0)  # where sigmoid and exp of float32 end, and beyond
FAR = [sign * size for size in (*SIZES, 1e4) for sign in (1, -1)]
PAPER = {"p_gamma": 0.05, "eq3": 1.0, "hard": 1.0, "detached": 0.05}  # Eq. 3 at its bound, where inf * 0 lurks


def placed(position: Tensor) -> PairLogps:
    """Log-probs from far below 0 for the chosen answer, by way of both at -1, to far below 0 for the rejected one."""
    return PairLogps(position.clamp(max=0) - 1, -position.clamp(min=0) - 1)


def at_log_odds(objective: Objective, batch: Batch, wanted: Tensor) -> PairLogps:
    """Log-probs of the policy at which the pairs have these log-odds, or the nearest that they can have."""
    low, high = torch.full_like(wanted, -1e7), torch.full_like(wanted, 1e7)
    for _ in range(80):
        middle = (low + high) / 2
        below = batch(objective, placed(middle)).log_odds < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return placed(low)


@each_case
def test_float32_stays_finite_at_log_odds_of_ten_thousand(name: str, parameters: dict[str, float]) -> None:
    batch = Batch(len(FAR))
    where = at_log_odds(build_objective(name, **parameters), batch, torch.tensor(FAR, dtype=torch.float64))
    for focal in wrappers(name, PAPER):
        policy = PairLogps(*(side.float().requires_grad_() for side in where))
        out = batch(build_objective(name, focal=focal, **parameters), policy)
        assert out.losses.dtype == torch.float32
        for tensor in (out.losses, out.log_odds, *slopes(out, policy)):
            assert tensor is not None
            assert tensor.isfinite().all(), focal
        if parameters.get("alpha", 0) >= 0:  # below, AlphaPO's rewards are bounded
            assert out.log_odds is not None
            close(out.log_odds[-2:], FAR[-2:], rtol=1e-3)


SMOOTHING = Decimal("0.1")
LINKS = {
    "dpo": oracles.cross_entropy,
    "cdpo": partial(oracles.cross_entropy, label_smoothing=SMOOTHING),
    "robust-dpo": partial(oracles.debiased, label_smoothing=SMOOTHING),
}
AT_TEN_THOUSAND: dict[tuple[str, str | None], tuple[float, float]] = {  # at log-odds of +10,000 and -10,000
    ("dpo", None): (0, 1e4),
    ("dpo", "p_gamma"): (0, 0),
    ("dpo", "detached"): (0, 0),
    ("dpo", "hard"): (0, 1e4),
    ("dpo", "eq3"): (1, 1e4),  # -log p / (1 - p) tends to 1
    ("cdpo", None): (1e3, 9e3),
    ("cdpo", "p_gamma"): (1e3, 0),
    ("cdpo", "detached"): (1e3, 0),
    ("cdpo", "hard"): (0, 9e3),
    ("robust-dpo", None): (-1e3 / 0.8, 9e3 / 0.8),
    ("robust-dpo", "p_gamma"): (-1e3 / 0.8, 0),
    ("robust-dpo", "detached"): (-1e3 / 0.8, 0),
    ("robust-dpo", "hard"): (0, 9e3 / 0.8),
}


@pytest.mark.parametrize(("name", "form"), AT_TEN_THOUSAND)
def test_float32_is_right_far_out(name: str, form: str | None) -> None:
    parameters = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    focal = None if form is None else {"form": form, "gamma": PAPER[form]}
    objective = build_objective(name, beta=1.0, focal=focal, **parameters)
    margins = torch.tensor(FAR)
    zeros = torch.zeros_like(margins)
    losses = objective(PairLogps(margins, zeros), PairLogps(zeros, zeros)).losses
    link = LINKS[name]
    expected = [oracles.preference(z, form, PAPER.get(form or "", 0), link) for z in FAR[:-2]]
    tiny = torch.finfo(torch.float32).tiny
    exact = torch.tensor([float(x) for x in expected], dtype=torch.float64)
    torch.testing.assert_close(losses[:-2].double(), exact, rtol=3e-5, atol=tiny)
    close(losses[-2:], AT_TEN_THOUSAND[name, form], rtol=1e-6)


# ---- what must be one and the same -----------------------------------------------------------------------------------


def bits(out: PairLosses, policy: PairLogps) -> list[bytes]:
    """Everything that training and its log take from an objective."""
    assert out.log_odds is not None
    tensors = (out.losses, out.log_odds, out.chosen_rewards, out.rejected_rewards, *slopes(out, policy))
    return [(tensor.detach() + 0.0).numpy().tobytes() for tensor in tensors]  # + 0.0: -0 is 0


def same(ours: Objective, theirs: Objective, dtype: torch.dtype = torch.float32) -> bool:
    """Bit for bit, near and far."""
    for stretch in (1, 50):
        policies = [BATCH.policy(dtype) for _ in range(2)]
        far = [PairLogps(*(stretch * side for side in policy)) for policy in policies]
        first, second = (bits(BATCH(x, y), z) for x, y, z in zip((ours, theirs), far, policies, strict=True))
        if first != second:
            return False
    return True


@each_case
def test_gamma_0_is_the_loss_without_a_factor_bit_for_bit(name: str, parameters: dict[str, float]) -> None:
    if name in FOCAL:
        objective = build_objective(name, **(parameters | {"gamma": 0.0}))
        assert same(objective, build_objective("dpo", beta=parameters["beta"]))
    for focal in filter(None, wrappers(name)):
        for dtype in (torch.float32, torch.float64):
            wrapped = build_objective(name, focal=focal | {"gamma": 0.0}, **parameters)
            assert same(wrapped, build_objective(name, **parameters), dtype)


@pytest.mark.parametrize(("name", "form"), FOCAL.items())
def test_the_named_ones_are_dpo_with_their_factor_bit_for_bit(name: str, form: str) -> None:
    gamma = GAMMAS[form]
    wrapped = build_objective("dpo", beta=0.1, focal={"form": form, "gamma": gamma})
    assert same(build_objective(name, beta=0.1, gamma=gamma), wrapped)
    assert not same(build_objective(name, beta=0.1, gamma=gamma), build_objective("dpo", beta=0.1))


ALIKE: list[tuple[str, dict[str, float], str, dict[str, float]]] = [
    ("cdpo", {"beta": 0.3, "label_smoothing": 0.0}, "dpo", {"beta": 0.3}),
    ("robust-dpo", {"beta": 0.3, "label_smoothing": 0.0}, "dpo", {"beta": 0.3}),
    ("h-dpo", {"beta": 0.3, "alpha": 1.0}, "dpo", {"beta": 0.3}),
    ("dpo-shift", {"beta": 0.3, "rejected_factor": 1.0}, "dpo", {"beta": 0.3}),
    ("length-dpo", {"beta": 0.3, "alpha": 0.0}, "dpo", {"beta": 0.3}),
    ("odpo", {"beta": 0.3, "alpha": 0.0}, "dpo", {"beta": 0.3}),
    ("alphapo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.0}, "simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}),
    (
        "alphapo",
        {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 1e-13},
        "simpo",
        {"beta": 2.0, "gamma_beta_ratio": 0.5},
    ),
    (
        "alphapo",
        {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": -1e-13},
        "simpo",
        {"beta": 2.0, "gamma_beta_ratio": 0.5},
    ),
]


@pytest.mark.parametrize(("name", "parameters", "other", "others"), ALIKE)
def test_limits_in_which_one_loss_is_another(
    name: str, parameters: dict[str, float], other: str, others: dict[str, float]
) -> None:
    policies = [BATCH.policy() for _ in range(2)]
    ours = BATCH(build_objective(name, **parameters), policies[0])
    theirs = BATCH(build_objective(other, **others), policies[1])
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-11, atol=1e-14)
    for mine, yours in zip(slopes(ours, policies[0]), slopes(theirs, policies[1]), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-11, atol=1e-14)


# ---- what turns round ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPABLE)
def test_the_clip_takes_the_gradient_of_turned_pairs_and_nothing_else(name: str) -> None:
    parameters = dict(CASES)[name]
    focal = {"form": "p_gamma", "gamma": 1.0}  # turns at -0.54
    free, clipped = (build_objective(name, focal=focal, guard=guard, **parameters) for guard in (None, "clip"))
    batch, policies = Batch(40), [Batch(40).policy() for _ in range(2)]
    outs = [batch(objective, policy) for objective, policy in zip((free, clipped), policies, strict=True)]
    assert torch.equal(outs[0].losses, outs[1].losses)
    link = build_objective(name, **parameters)
    turned = (free.weights(outs[0].log_odds) * link.weights(outs[0].log_odds)) < 0
    assert 0 < turned.sum() < len(turned)
    weights = clipped.weights(outs[1].log_odds)
    assert torch.equal(weights, torch.where(turned, 0.0, free.weights(outs[0].log_odds)))
    beside = -parameters.get("nll_weight", 0) / batch.columns["n_w"]  # CPO's likelihood goes on teaching
    ours, theirs = (slopes(out, policy) for out, policy in zip(outs, policies, strict=True))
    torch.testing.assert_close(theirs[0], torch.where(turned, beside, ours[0]), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(theirs[1], torch.where(turned, 0.0, ours[1]), rtol=1e-12, atol=1e-15)


def test_the_product_of_equation_3_and_a_smoothed_loss_has_no_bound() -> None:
    """Why the two are refused together: the label that may be wrong keeps a loss of e z, times e^(gamma z)."""
    smoothed = partial(oracles.cross_entropy, label_smoothing=SMOOTHING)
    products = [float(oracles.preference(z, "eq3", 0.3, smoothed)) for z in (10.0, 20.0, 40.0, 80.0)]
    assert all(later > 20 * sooner for sooner, later in pairwise(products))
    for name in SMOOTHED:
        with pytest.raises(InputError, match="diverges"):
            build_objective(name, beta=1.0, focal={"form": "eq3", "gamma": 0.05})
