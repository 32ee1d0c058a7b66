"""Made-up pairs for the oracles: as exact numbers, and as the tensors that the library's objectives take."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal.objectives import PairLogps, PairLosses, PairScores
from lorafocal.objectives.objective import Objective
from tests.objectives import oracles
from tests.objectives.oracles import Pair

GAMMAS = {"p_gamma": 0.2, "eq3": 0.3, "hard": 1.0, "detached": 0.5}  # large, so that the factor shows


def each_of(cases: Sequence[tuple[str, dict[str, float]]]) -> pytest.MarkDecorator:
    """A test of each objective with these parameters."""
    ids = [f"{name}-{'-'.join(map(str, values.values()))}" for name, values in cases]
    return pytest.mark.parametrize(("name", "parameters"), cases, ids=ids)


class Batch:
    """Made-up pairs, right and wrong ones, short and long, scored low and high; their numbers as tensors too."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.pairs = [self._one(draw) for _ in range(count)]
        rows = [oracles.numbers(pair) for pair in self.pairs]
        self.columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

    @staticmethod
    def _one(draw: random.Random) -> Pair:
        sides: dict[str, float] = {}
        for side in ("w", "l"):
            n = draw.randint(1, 40)
            a = -n * draw.uniform(0.1, 2.0)
            collision = -n * draw.uniform(0.1, 1.5)
            sides |= {f"a_{side}": a, f"b_{side}": a + draw.gauss(0, 4), f"n_{side}": n, f"c_{side}": collision}
        s_l = draw.uniform(0, 5)
        return Pair.of(**sides, s_l=s_l, s_w=s_l + draw.uniform(0.05, 4))

    def both(self, letter: str) -> list[Tensor]:
        """Of chosen and rejected answers."""
        return [self.columns[f"{letter}_w"], self.columns[f"{letter}_l"]]

    def policy(self, dtype: torch.dtype = torch.float64) -> PairLogps:
        """Its log-probs, which take gradients."""
        return PairLogps(*(side.to(dtype, copy=True).requires_grad_() for side in self.both("a")))

    def __call__(self, objective: Objective, policy: PairLogps) -> PairLosses:
        """The objective of these pairs at these log-probs of the policy, in their dtype."""
        reference = PairLogps(*(side.to(policy.chosen.dtype) for side in self.both("b")))
        return objective(
            policy,
            reference,
            torch.cat(self.both("n")).long(),
            scores=PairScores(*self.both("s")),
            collisions=torch.cat(self.both("c")).to(policy.chosen.dtype),
        )


def slopes(out: PairLosses, policy: PairLogps) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.losses.sum(), [policy.chosen, policy.rejected])


def close(actual: Tensor | None, expected: Sequence[Any], rtol: float = 1e-11) -> None:
    assert actual is not None
    exact = torch.tensor([float(number) for number in expected], dtype=torch.float64)
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=1e-13)
