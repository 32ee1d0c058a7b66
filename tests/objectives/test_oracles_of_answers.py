"""Losses of further answers against their papers' equations, far out, and where one is another."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal.objectives import OBJECTIVES, OtherAnswers, PairLogps, PairLosses, build_objective
from lorafocal.objectives.registry.answers import ANSWERS
from tests.objectives import oracles_of_answers as oracles
from tests.objectives.batch import Batch, close, each_of
from tests.objectives.oracles_of_answers import Other

CASES: list[tuple[str, dict[str, float]]] = [
    ("triple-po", {"beta": 0.01, "nll_weight": 1.0}),
    ("triple-po", {"beta": 0.2, "nll_weight": 0.05}),
    ("triple-po-length", {"beta": 2.0, "target_margin": 1.6, "nll_weight": 0.05}),
    ("triple-po-length", {"beta": 10.0, "target_margin": 0.0, "nll_weight": 1.0}),
    ("rationale-dpo", {"beta": 0.1, "rationale_scale": 0.1}),
    ("rationale-dpo", {"beta": 0.5, "rationale_scale": 0.001}),
    ("xpo", {"beta": 0.1, "alpha": 1e-5}),
    ("xpo", {"beta": 0.4, "alpha": 0.3}),
    ("selm", {"beta": 0.01, "alpha": 1e-3}),
    ("selm", {"beta": 0.4, "alpha": 0.5}),
]
each_case = each_of(CASES)
BATCH = Batch(5, seed=3)
PAIR = (0, 1, 1, 3, 4, 4, 4)  # whose the further answers are: of some pairs several, of one none


def made_up(seed: int = 4) -> list[Other]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 30) for _ in PAIR]
    sums = [-n * draw.uniform(0.1, 2.0) for n in lengths]
    return [Other(*map(Decimal, (a, a + draw.gauss(0, 3), n))) for a, n in zip(sums, lengths, strict=True)]


YS = made_up()
OF_PAIR = [[y for y, whose in zip(YS, PAIR, strict=True) if whose == pair] for pair in range(len(BATCH.pairs))]


def others(logps: Tensor) -> OtherAnswers:
    _, reference, lengths = (torch.tensor([float(y[n]) for y in YS], dtype=torch.float64) for n in range(3))
    return OtherAnswers(logps, reference.to(logps.dtype), torch.tensor(PAIR), lengths.long(), None)


def of_batch(
    name: str, parameters: dict[str, float], focal: dict[str, Any] | None = None
) -> tuple[PairLosses, list[Tensor]]:
    """The library's losses, and the leaves that they are of."""
    policy = BATCH.policy()
    logps = torch.tensor([float(y.a) for y in YS], dtype=torch.float64, requires_grad=True)
    reference, lengths = PairLogps(*BATCH.both("b")), torch.cat(BATCH.both("n")).long()
    out = build_objective(name, focal=focal, **parameters)(policy, reference, lengths, others=others(logps))
    return out, [*policy, logps]


def test_every_objective_of_the_family_has_its_oracle() -> None:
    assert {name for name, _ in CASES} == oracles.LOSSES.keys() == ANSWERS.keys() <= OBJECTIVES.keys()


@each_case
def test_values_and_slopes_are_the_paper_s_with_and_without_a_factor(name: str, parameters: dict[str, float]) -> None:
    for form, gamma in ((None, 0.0), ("p_gamma", 0.2), ("hard", 1.0)):
        out, leaves = of_batch(name, parameters, form and {"form": form, "gamma": gamma})
        told = {"form": form, "gamma": gamma} | parameters
        pairs = list(zip(BATCH.pairs, OF_PAIR, strict=True))
        close(out.losses, [oracles.value(name, x, ys, **told) for x, ys in pairs])
        exact = [oracles.slopes(name, x, ys, **told) for x, ys in pairs]
        chosen, rejected, further = torch.autograd.grad(out.losses.sum(), leaves)
        close(chosen, [row[0] for row in exact], rtol=1e-10)
        close(rejected, [row[1] for row in exact], rtol=1e-10)
        close(further, [slope for row in exact for slope in row[2:]], rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "plain", "parameters"),
    [
        ("triple-po", "cpo", {"beta": 0.1, "nll_weight": 0.0}),
        ("triple-po-length", "simpo", {"beta": 2.0, "target_margin": 1.0, "gamma_beta_ratio": 0.5, "nll_weight": 0.0}),
        ("xpo", "dpo", {"beta": 0.1, "alpha": 0.0}),
        ("selm", "dpo", {"beta": 0.1, "alpha": 0.0}),
    ],
)
def test_without_the_further_answer_s_term_it_is_the_preference_s_own(
    name: str, plain: str, parameters: dict[str, float]
) -> None:
    def known(objective: str) -> dict[str, float]:
        return {key: value for key, value in parameters.items() if key in OBJECTIVES[objective].parameters}

    ours, theirs = (of_batch(objective, known(objective))[0] for objective in (name, plain))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.log_odds, theirs.log_odds, rtol=1e-12, atol=1e-15)


def test_a_gold_answer_that_is_the_chosen_one_makes_triple_po_cpo() -> None:
    policy, lengths = BATCH.policy(), torch.cat(BATCH.both("n")).long()
    count = len(policy.chosen)
    gold = OtherAnswers(policy.chosen, None, torch.arange(count), lengths[:count], None)
    parameters = {"beta": 0.2, "nll_weight": 0.7}
    ours = build_objective("triple-po", **parameters)(policy, lengths=lengths, others=gold)
    theirs = build_objective("cpo", **parameters)(policy, lengths=lengths)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=0)


@each_case
def test_float32_stays_finite_at_ten_thousand_nats(name: str, parameters: dict[str, float]) -> None:
    sizes = torch.tensor([1e-3, 17.0, 88.0, 104.0, 1e4])
    places = torch.cartesian_prod(-sizes, -sizes, -sizes)
    chosen, rejected, logps = (side.clone().requires_grad_() for side in places.T)
    zeros = torch.zeros_like(chosen)
    count = len(zeros)
    further = OtherAnswers(logps, zeros, torch.arange(count), torch.full((count,), 7), None)
    objective = build_objective(name, **parameters)
    out = objective(PairLogps(chosen, rejected), PairLogps(zeros, zeros), torch.full((2 * count,), 7), others=further)
    for tensor in (out.losses, *torch.autograd.grad(out.losses.sum(), [chosen, rejected, logps])):
        assert tensor.isfinite().all()
