"""Losses over the whole step against their papers' equations, in numbers, slopes and the state that they leave, their
limits, and what packs of a step say of them."""

from __future__ import annotations

import random
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal.objectives import (
    OBJECTIVES,
    OtherAnswers,
    PairInputs,
    PairLogps,
    PairLosses,
    PairScores,
    build_objective,
)
from lorafocal.objectives.registry.sets import SETS
from lorafocal.whole_step import shared_out
from tests.objectives import oracles_of_steps
from tests.objectives.batch import Batch, close, each_of
from tests.objectives.logps import some
from tests.objectives.oracles_of_steps import Told

CASES: list[tuple[str, dict[str, float]]] = [
    ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ("kto", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("dr-dpo", {"beta": 0.4, "beta_prime": 1.0}),
    ("dr-dpo", {"beta": 0.4, "beta_prime": 0.2}),
    ("beta-dpo", {"beta": 0.1, "sensitivity": 0.6, "filtered_share": 0.25, "momentum": 0.9}),
    ("beta-dpo", {"beta": 0.3, "sensitivity": 0.1, "filtered_share": 0.5, "momentum": 0.0}),
    ("gamma-po", {"beta": 0.4, "gamma_beta_ratio": 2.0, "tau": 10.0}),
    ("gamma-po", {"beta": 0.4, "gamma_beta_ratio": 5.0, "tau": 0.4}),
    ("gamma-simpo", {"beta": 10.0, "gamma_beta_ratio": 0.4, "tau": 10.0}),
    ("gamma-simpo", {"beta": 2.5, "gamma_beta_ratio": 0.15, "tau": 3.0}),
    ("group-dpo", {"beta": 0.4, "eta": 0.01}),
    ("group-dpo", {"beta": 0.4, "eta": 2.0}),
    ("relative-dpo", {"beta": 0.5, "tau": 0.5}),
    ("relative-dpo-diagonal", {"beta": 0.5, "diagonal_weight": 0.8}),
    ("mpo", {"beta": 0.3, "alpha": 1.0}),
    ("mpo", {"beta": 0.3, "alpha": 0.0}),
    ("exo-reward", {"beta": 0.5, "score_temperature": 0.5}),
    ("exo-reward", {"beta": 0.1, "score_temperature": 3.0}),
]
each_case = each_of(CASES)
COUNT = 8
BATCHES = Batch(COUNT), Batch(COUNT, seed=1)  # two steps


def told_of(seed: int) -> Told:
    draw = random.Random(seed)
    return Told(
        draws=[Decimal(draw.random()) for _ in range(COUNT)],
        groups=[draw.choice([0, 1, 3]) for _ in range(COUNT)],  # the third has no pairs
        num_groups=4,
        embeddings=[[Decimal(draw.gauss(0, 1)) for _ in range(3)] for _ in range(COUNT)],
        others=[
            [tuple(Decimal(draw.uniform(*ends)) for ends in ((-40, 0), (-40, 0), (0, 6))) for _ in range(n % 3)]
            for n in range(COUNT)
        ],  # type: ignore[misc]
    )


TOLD = told_of(0), told_of(1)


def inputs(step: int = 0, dtype: torch.dtype = torch.float64) -> PairInputs:
    """The pairs of a step, whose log-probs under the policy take gradients."""
    batch, told = BATCHES[step], TOLD[step]
    others = [(n, *answer) for n, answers in enumerate(told.others) for answer in answers]
    pair, *columns = (torch.tensor([float(x) for x in side], dtype=torch.float64) for side in zip(*others, strict=True))
    return PairInputs(
        policy=batch.policy(dtype),
        reference=PairLogps(*(side.to(dtype) for side in batch.both("b"))),
        lengths=torch.cat(batch.both("n")).long(),
        scores=PairScores(*batch.both("s")),
        collisions=torch.cat(batch.both("c")),
        divergences=torch.cat(batch.both("c")),
        others=OtherAnswers(columns[0].to(dtype), columns[1].to(dtype), pair.long(), pair.long() + 1, columns[2]),
        groups=torch.tensor(told.groups),
        num_groups=told.num_groups,
        embeddings=torch.tensor([[float(x) for x in row] for row in told.embeddings], dtype=torch.float64),
        draws=torch.tensor([float(draw) for draw in told.draws], dtype=torch.float64),
    )


def gradients(out: PairLosses, of: PairInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.losses.sum(), list(of.policy), retain_graph=True)


def in_packs(whole: PairInputs, *packs: list[int]) -> list[PairInputs]:
    detached = replace(whole, policy=PairLogps(*(side.detach() for side in whole.policy)))
    return [some(detached, pack) for pack in packs]


# ---- the printed equations -------------------------------------------------------------------------------------------


def test_every_loss_over_a_step_or_a_set_has_its_oracle() -> None:
    over_steps = {name for name, of in OBJECTIVES.items() if of.whole_step}
    assert {name for name, _ in CASES} == over_steps | SETS.keys()


def test_exo_of_two_answers_is_reward_aware_po_forward() -> None:
    of = replace(inputs(), others=None)
    sets = build_objective("exo-reward", beta=0.3, score_temperature=2.0).of(of)
    pairs = build_objective("reward-aware-forward", beta=0.3, eta=0.5).of(of)
    torch.testing.assert_close(sets.losses, pairs.losses, rtol=1e-12, atol=1e-14)


@each_case
def test_values_slopes_and_state_of_two_steps_are_the_paper_s(name: str, parameters: dict[str, float]) -> None:
    objective, state, before = build_objective(name, **parameters), {}, None
    for step in range(2):
        of = inputs(step)
        out = objective.of(of, state)
        expected, left = oracles_of_steps.value(name, BATCHES[step].pairs, TOLD[step], before, **parameters)
        close(out.losses, expected)
        exact = oracles_of_steps.slopes(name, BATCHES[step].pairs, TOLD[step], before, **parameters)
        for slope, wanted in zip(gradients(out, of), exact, strict=True):
            close(slope, wanted, rtol=1e-9)
        before, state = left, dict(out.state or {})
    if OBJECTIVES[name].state:
        assert before is not None
        numbers = torch.cat([value.reshape(-1) for value in state.values()])
        numbers = numbers.exp() if name == "group-dpo" else numbers
        close(numbers.sort().values, sorted(before))


@each_case
def test_they_are_finite_at_extreme_log_probs_in_float32(name: str, parameters: dict[str, float]) -> None:
    of = inputs(dtype=torch.float32)
    far = torch.tensor([-3e3, 3e3, -1e4, 1e4, 0.0, 1.0, -200.0, 200.0])
    of = replace(
        of,
        policy=PairLogps(
            *((side + sign * far).detach().requires_grad_() for side, sign in zip(of.policy, (1, -1), strict=True))
        ),
    )
    out = build_objective(name, **parameters).of(of)
    assert torch.isfinite(out.losses).all()
    assert all(torch.isfinite(slope).all() for slope in gradients(out, of))
    assert all(torch.isfinite(value).all() for value in (out.state or {}).values())


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("beta-dpo", {"sensitivity": 0.0, "filtered_share": 0.0}),
        ("gamma-po", {"gamma_beta_ratio": 0.0}),
        ("relative-dpo-diagonal", {"diagonal_weight": 1.0}),
    ],
)
def test_each_pair_s_loss_is_dpo_s_in_the_limit(name: str, parameters: dict[str, float]) -> None:
    of = inputs()
    found, plain = (build_objective(n, beta=0.4, **p).of(of) for n, p in ((name, parameters), ("dpo", {})))
    torch.testing.assert_close(found.losses, plain.losses, rtol=1e-12, atol=0)
    for one, other in zip(gradients(found, of), gradients(plain, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "parameters", "rtol"), [("dr-dpo", {"beta_prime": 1e9}, 1e-7), ("group-dpo", {"eta": 0.5}, 1e-12)]
)
def test_the_step_s_loss_is_dpo_s_mean_in_the_limit(name: str, parameters: dict[str, float], rtol: float) -> None:
    """Dr. DPO's of a large beta', group-robust DPO's of one group."""
    of = replace(inputs(), groups=torch.zeros(COUNT, dtype=torch.int64), num_groups=1)
    found, plain = (build_objective(n, beta=0.4, **p).of(of) for n, p in ((name, parameters), ("dpo", {})))
    torch.testing.assert_close(found.losses.mean(), plain.losses.mean(), rtol=rtol, atol=0)
    for one, other in zip(gradients(found, of), gradients(plain, of), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)


def test_gamma_simpo_of_a_large_tau_is_simpo_and_mpo_of_two_answers_is_dpo() -> None:
    of = inputs()
    even = build_objective("gamma-simpo", beta=2.0, gamma_beta_ratio=0.5, tau=1e12).of(of)
    simpo = build_objective("simpo", beta=2.0, gamma_beta_ratio=0.5).of(of)
    torch.testing.assert_close(even.losses, simpo.losses, rtol=1e-9, atol=0)
    nobody = OtherAnswers(*(column[:0] for column in of.others))  # type: ignore[union-attr, arg-type, index]
    for others in (None, nobody):
        two = build_objective("mpo", beta=0.4, alpha=2.0).of(replace(of, others=others))
        torch.testing.assert_close(two.losses, build_objective("dpo", beta=0.4).of(of).losses, rtol=1e-12, atol=1e-15)


def test_a_step_of_one_pair_has_dpo_s_loss_where_there_is_nothing_to_compare_it_with() -> None:
    [one] = in_packs(inputs(), [3])
    plain = build_objective("dpo", beta=0.4).of(one).losses
    for name in ("dr-dpo", "relative-dpo-diagonal", "relative-dpo"):
        torch.testing.assert_close(build_objective(name, beta=0.4).of(one).losses, plain, rtol=1e-12, atol=0)
    out = build_objective("beta-dpo", beta=0.4).of(one)
    assert torch.isfinite(out.losses).all()
    assert out.losses.item() > 0  # it is kept


def test_beta_dpo_keeps_every_pair_where_margins_do_not_vary() -> None:
    """As at the start of a run, where all are 0: then any of them may be left out, and beta is the config's."""
    of = inputs()
    same = replace(of, policy=PairLogps(*(side.clone().requires_grad_() for side in of.reference)))  # type: ignore[union-attr]
    out = build_objective("beta-dpo", beta=0.4).of(same)
    assert (out.losses > 0).sum() == int(COUNT * 0.8)
    assert float(out.losses.detach().mean()) == pytest.approx(0.6931471805599453, rel=1e-12)


def test_beta_dpo_leaves_out_far_pairs_more_often() -> None:
    """Over many draws, as often as sampling one by one by the weights of Eq. 8 does: here of 2 of 3 pairs."""
    weights = [1.0, 0.5, 0.1]
    kept = torch.zeros(3)
    from lorafocal.objectives.beta_dpo import _sampled

    draws = torch.rand(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for draw in draws:
        kept += _sampled(torch.tensor(weights, dtype=torch.float64).log(), draw, 1 / 3)
    total = sum(weights)
    wanted = [
        w / total + sum(v / total * w / (total - v) for j, v in enumerate(weights) if j != i)
        for i, w in enumerate(weights)
    ]
    torch.testing.assert_close(kept / 4000, torch.tensor(wanted), rtol=0, atol=0.03)


def test_mpo_has_good_and_bad_answers_where_scores_differ_by_their_last_digit() -> None:
    """The mean of nearly equal scores may round beyond the worst of them, and all would be good."""
    draw, count = random.Random(0), 200
    low = torch.tensor([draw.uniform(0.05, 9) for _ in range(count)], dtype=torch.float64)
    high = torch.nextafter(low, torch.tensor(99.0, dtype=torch.float64))
    pair = torch.arange(count).repeat_interleave(torch.tensor([draw.randint(1, 5) for _ in range(count)]))
    judged = torch.stack([draw.choice([low, high])[whose] for whose in pair])
    policy = PairLogps(*(torch.full((count,), at, dtype=torch.float64, requires_grad=True) for at in (-1.0, -2.0)))
    still = torch.full(pair.shape, -3.0, dtype=torch.float64)
    reference = PairLogps(*(side.detach() for side in policy))
    others = OtherAnswers(still, still, pair, pair + 1, judged)
    out = build_objective("mpo", beta=0.1, alpha=1.0)(policy, reference, scores=PairScores(high, low), others=others)
    for tensor in (out.losses, out.log_odds, *torch.autograd.grad(out.losses.sum(), list(policy))):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_gamma_po_looks_at_no_more_than_256_margins_and_remembers_2048() -> None:
    objective = build_objective("gamma-po", beta=0.4, gamma_beta_ratio=2.0)
    left = objective.of(inputs(), {"margins": torch.randn(2045, dtype=torch.float64)}).state
    assert left is not None
    assert left["margins"].shape == (2048,)
    many = {"margins": torch.linspace(-3, 3, 2048, dtype=torch.float64)}
    losses = [objective.of(inputs(), many).losses for _ in range(2)]
    assert torch.equal(*losses)  # the same draws draw the same margins
    others = objective.of(replace(inputs(), draws=inputs(1).draws), many).losses
    assert not torch.equal(losses[0], others)


# ---- the focal factor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dr-dpo", "beta-dpo", "gamma-po", "gamma-simpo", "group-dpo", "mpo"])
def test_a_factor_of_gamma_0_is_none_bit_for_bit(name: str) -> None:
    of = inputs(dtype=torch.float32)
    plain, wrapped = (build_objective(name, focal=focal).of(of) for focal in (None, {"gamma": 0.0}))
    assert torch.equal(plain.losses, wrapped.losses)
    assert all(map(torch.equal, gradients(plain, of), gradients(wrapped, of)))


def test_a_factor_is_around_a_pair_s_own_loss_before_the_step_makes_one_of_all() -> None:
    of = inputs()
    focal = build_objective("focalpo", beta=0.4, gamma=0.2).of(of).losses
    found = build_objective("dr-dpo", beta=0.4, beta_prime=0.5, focal={"gamma": 0.2}).of(of)
    robust = -0.5 * (-focal / 0.5).exp().mean().log()
    torch.testing.assert_close(found.losses, robust.expand(COUNT), rtol=1e-12, atol=0)
    for one, other in zip(gradients(found, of), torch.autograd.grad(COUNT * robust, list(of.policy)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


# ---- packs of a step -------------------------------------------------------------------------------------------------


@each_case
def test_shares_of_packs_are_those_of_one_pack_and_have_its_slopes(name: str, parameters: dict[str, float]) -> None:
    """Packs of any size and order, log-probs and further answers of a second pass among what is differentiated."""
    objective, of = build_objective(name, **parameters), inputs()
    of = replace(of, others=of.others._replace(logps=of.others.logps.requires_grad_()))  # type: ignore[union-attr]
    whole = objective.of(of)
    towards = [*of.policy, of.others.logps]  # type: ignore[union-attr]
    wanted = torch.autograd.grad(whole.losses.sum(), towards, allow_unused=True)
    order = [[6, 1], [0], [5, 7, 2, 4], [3]]
    packs = in_packs(of, *order)
    shares, state = shared_out(objective, packs, {}, torch.device("cpu"), of.num_groups)
    for members, pack, share in zip(order, packs, shares, strict=True):
        again = PairLogps(*(side.clone().requires_grad_() for side in pack.policy))
        others = pack.others.logps.detach().clone().requires_grad_()  # type: ignore[union-attr]
        losses = share.losses_of(again, others)
        torch.testing.assert_close(losses.losses, whole.losses[members], rtol=1e-12, atol=1e-15)
        found = torch.autograd.grad(losses.losses.sum(), [*again, others])
        for side in (0, 1):
            torch.testing.assert_close(found[side], wanted[side][members], rtol=1e-10, atol=1e-14)
        if wanted[2] is not None:
            mine = [place for pair in members for place, of_ in enumerate(of.others.pair.tolist()) if of_ == pair]  # type: ignore[union-attr]
            torch.testing.assert_close(found[2], wanted[2][mine], rtol=1e-10, atol=1e-14)
    assert state.keys() == dict(whole.state or {}).keys()
    for key, value in state.items():
        torch.testing.assert_close(value, whole.state[key], rtol=1e-12, atol=1e-15)  # type: ignore[index]


def test_a_share_keeps_the_policy_s_width() -> None:
    """The step is computed in float64, whatever the log-probs' own."""
    of: Any = inputs(dtype=torch.float32)
    [pack] = in_packs(of, list(range(COUNT)))
    [share], _ = shared_out(build_objective("dr-dpo"), [pack], {}, torch.device("cpu"))
    assert share.losses.losses.dtype == torch.float64
    assert share.losses_of(of.policy).losses.dtype == torch.float32
