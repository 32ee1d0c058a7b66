"""An objective of the registry with its parameters bound, ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lorafocal.objectives import Entry, entry_of, python_name
from lorafocal.objectives.pairwise import PairLogps, PairLosses, PairScores


@dataclass(frozen=True, slots=True)
class Objective:
    """A chosen objective with its parameters bound."""

    name: str
    entry: Entry
    parameters: Mapping[str, float]
    loss: Callable[..., PairLosses]
    statistics: Callable[[PairLogps, PairLogps], Tensor] | None

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None = None,
        lengths: Tensor | None = None,
        *,
        scores: PairScores | None = None,
        statistics: Tensor | None = None,
    ) -> PairLosses:
        """Per-pair losses and rewards; what the objective does not need may be left out.

        `lengths` (2B,) are completion tokens, chosen first; `statistics` (K,) means over all pairs of the step.
        """
        given = {"reference": reference, "lengths": lengths, "scores": scores, "statistics": statistics}
        return self.loss(policy, **{name: value for name, value in given.items() if getattr(self.entry, name)})

    def weights(self, margins: Tensor, scores: PairScores | None = None) -> Tensor:
        """How much pairs of these margins weigh in the gradient, -dL/dmargin, (B,), float64, detached.

        Of the loss itself, by autograd. Only for an objective that is `of_margin`.
        """
        with torch.enable_grad():
            margin = margins.detach().double().requires_grad_()
            nought = torch.zeros_like(margin)
            policy, reference = (PairLogps(side, nought) for side in (margin / self.parameters["beta"], nought))
            losses = self(policy, reference, margin.new_ones(2 * len(margin)), scores=scores).losses
            return -torch.autograd.grad(losses.sum(), margin)[0]


def build_objective(name: str, **parameters: float | None) -> Objective:
    """The objective `name` with its parameters checked; None is its default, and what it has not is left aside.

    Parameters go by their names in a config or in Python. Raises InputError for an unknown name, and for a value that
    cannot train, such as beta <= 0 or a gamma that learns backwards from the first step.
    """
    entry = entry_of(name)
    values = {}
    for key, parameter in entry.parameters.items():
        given = parameters.get(key, parameters.get(python_name(key)))
        values[key] = parameter.default if given is None else given
        parameter.check(values[key])
    bound = partial(_function(entry.loss), **{python_name(key): value for key, value in values.items()})
    statistics = None if entry.statistics is None else _function(entry.statistics)
    return Objective(name, entry, values, bound, statistics)


def _function(place: str | Callable[..., Any]) -> Callable[..., Any]:
    """A function, or `file.function` of this room."""
    if callable(place):
        return place
    file, _, function = place.partition(".")
    return getattr(import_module(f"{__package__}.{file}"), function)


def mean_loss(losses: Tensor, num_pairs: int) -> Tensor:
    """Sum over a pack's pairs divided by the pairs of the whole optimiser step (never a mean of means)."""
    return losses.sum() / num_pairs
