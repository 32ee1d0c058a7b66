"""AdamW ignores a constant factor on the loss, so DPO at the same learning rate is FocalPO's control."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorafocal.data.tokens import TokenizedPair
from lorafocal.objectives import PairLogps, build_objective
from tests.tiny import pairs, relative_difference, tiny_policy

STEPS, BETA = 6, 0.1
SMALLER = 0.9325  # FocalPO(0.05)'s mean weight over DPO's where margins are near 0
TRAIN = pairs(STEPS)

Optimiser = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def logps(model: torch.nn.Module, pair: TokenizedPair) -> Tensor:
    """Of both answers, (2,). Padding behind an answer changes nothing before it."""
    rows = [torch.tensor([*pair.prompt_ids, *answer]) for answer in (pair.chosen_ids, pair.rejected_ids)]
    tokens, prompt = pad_sequence(rows, batch_first=True), len(pair.prompt_ids)
    logits = model(tokens).logits[:, prompt - 1 : -1].log_softmax(-1)
    by_token = logits.gather(-1, tokens[:, prompt:, None]).squeeze(-1)
    return torch.stack([log[: len(row) - prompt].sum() for log, row in zip(by_token, rows, strict=True)])


def trajectory(scale: float, optimiser: Optimiser) -> list[dict[str, Tensor]]:
    """The adapter after each step of DPO with this factor on its loss, in float64."""
    model = tiny_policy(dtype=torch.float64).double()
    trained = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    steps, objective = optimiser(trained.values()), build_objective("dpo", beta=BETA)
    with torch.no_grad(), model.disable_adapter():
        reference = [logps(model, pair) for pair in TRAIN]
    adapters = []
    for pair, fixed in zip(TRAIN, reference, strict=True):
        sides = [PairLogps(*both[:, None]) for both in (logps(model, pair), fixed)]
        (scale * objective(*sides, torch.ones(2)).losses.mean()).backward()
        steps.step()
        steps.zero_grad()
        adapters.append({name: weights.detach().clone() for name, weights in trained.items()})
    return adapters


def apart(optimiser: Optimiser) -> float:
    """How far the trajectories with and without the factor lie apart at most, over the way that is gone."""
    with_it, without = trajectory(SMALLER, optimiser), trajectory(1.0, optimiser)
    moved = relative_difference(without[-1], without[0])
    assert moved > 0.01  # otherwise it would say nothing
    return max(relative_difference(ours, theirs) for ours, theirs in zip(with_it, without, strict=True)) / moved


@pytest.mark.parametrize(("epsilon", "at_most"), [(1e-8, 5e-4), (1e-12, 1e-6)])
def test_adamw_ignores_a_constant_factor_on_the_loss(epsilon: float, at_most: float) -> None:
    """But for its epsilon, which is what is left: 1.3e-4 of the way at 1e-8 and 1.8e-7 at 1e-12 (measured)."""
    assert apart(lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01, eps=epsilon)) < at_most


def test_plain_gradient_descent_takes_smaller_steps() -> None:
    assert apart(lambda weights: torch.optim.SGD(weights, lr=0.1)) == pytest.approx(1 - SMALLER, rel=0.1)
