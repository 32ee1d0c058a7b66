"""An objective of the registry with its parameters bound, ready to be called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.objectives import PARAMETERS, entry_of, python_name
from lorafocal.objectives.entry import Entry, Function
from lorafocal.objectives.factor import FORMS, Factor, factor_of, misfits, record_of
from lorafocal.objectives.inputs import PairInputs, PairLogps
from lorafocal.objectives.pairwise import Odds, Over, PairLosses
from lorafocal.objectives.preference import PreferenceTerm


@dataclass(frozen=True, slots=True)
class Objective:
    """A chosen objective with its parameters bound.

    `factor` is the focal factor, if any: its own, or one put around it. `preference` is the loss of log-odds, None
    without a Bradley-Terry form.
    """

    name: str
    entry: Entry
    parameters: Mapping[str, float]
    factor: Factor | None
    guard: str | None
    preference: PreferenceTerm | None
    loss: Callable[..., PairLosses]
    token_weights: Callable[..., Tensor] | None

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None = None,
        lengths: Tensor | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
        **beside: Any,
    ) -> PairLosses:
        """Losses and rewards of B pairs; what the objective does not need may be left out.

        The keywords are those of `PairInputs`; `state` is what the step before left, empty before the first.
        """
        return self.of(PairInputs(policy=policy, reference=reference, lengths=lengths, **beside), state)

    def of(self, inputs: PairInputs, state: Mapping[str, Tensor] | None = None) -> PairLosses:
        """The same of `inputs` as they are."""
        return self.loss(inputs.policy, **inputs.asked(), state=state or {})

    def weights(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        """How much pairs of these log-odds, (B,), weigh in the gradient: -dL/dlog_odds, (B,), float64, detached.

        Of the preference term that is trained, factor and guard included, by autograd. Only for an objective with a
        Bradley-Terry form. `constants` are those of `PairLosses`, where it has any.
        """
        return self._preference.weights(log_odds, *constants)

    def turned(self, log_odds: Tensor) -> Tensor:
        """Which pairs' gradient the factor turns round, (B,) bool, whether or not a guard then takes it away."""
        return self._preference.turned(log_odds)

    @property
    def turns(self) -> bool:
        """Whether its factor can turn a pair's gradient round."""
        return self.preference is not None and self.preference.turning_gamma > 0

    @property
    def turning_point(self) -> float:
        """The log-odds below which the factor turns a pair's gradient round; -inf where there are none."""
        return -math.inf if self.preference is None else self.preference.turning_point

    @property
    def _preference(self) -> PreferenceTerm:
        if self.preference is None:
            raise ValueError(f"{self.name} has no Bradley-Terry form, and so no weights of log-odds")
        return self.preference

    @property
    def focal(self) -> Factor | None:
        """The factor that was put around it; None for one of its own."""
        return None if self.entry.factor is not None else self.factor

    def as_dict(self) -> dict[str, Any]:
        """Its record in manifests and lineage, which `objective_from` reads."""
        return record_of(self.name, self.parameters, self.focal and self.focal._asdict(), self.guard)


def build_objective(
    name: str, *, focal: Mapping[str, Any] | None = None, guard: str | None = None, **parameters: float | None
) -> Objective:
    """The objective `name` with its parameters checked; None is its default, and what it has not is left aside.

    Parameters go by their names in a config or in Python. `focal` ({"form": one of `factor.FORMS`, "gamma": number})
    puts a factor around a loss with a Bradley-Terry form; `guard="clip"` takes the gradient from pairs that a factor
    would turn round. Raises InputError for an unknown name, and for a value that cannot train, such as beta <= 0 or a
    gamma that learns backwards from the first step.
    """
    entry = entry_of(name)
    values = {}
    for key, parameter in entry.parameters.items():
        given = parameters.get(key, parameters.get(python_name(key)))
        values[key] = parameter.default if given is None else given
        parameter.check(values[key])
    if wrong := [f"objective.{key}: {why}" for key, why in misfits(name, entry, focal, guard)]:
        raise InputError("\n".join(wrong))
    factor = factor_of(entry, values, focal)
    preference = _preference(entry, values, factor, guard) if entry.bradley_terry else None
    loss = _asking(entry.loss, values) if preference is None else _composed(entry, values, preference)
    weights = _asking(entry.token_weights, values)
    return Objective(name, entry, values, factor, guard, preference, loss, weights)


def objective_from(record: Mapping[str, Any]) -> Objective:
    """The objective that `Objective.as_dict` wrote. Raises InputError for a record this version cannot honour."""
    if unknown := sorted(map(str, record.keys() - {"name", "focal", "guard", *PARAMETERS})):
        raise InputError(f"objective: {', '.join(unknown)} is not known here; use the version that wrote it")
    return build_objective(**{"name": "", **record})


def _preference(entry: Entry, values: Mapping[str, float], factor: Factor | None, guard: str | None) -> PreferenceTerm:
    link = _bound(entry.link, values)
    if factor is None:
        return PreferenceTerm(link)
    form = FORMS[factor.form]
    around = partial(_function(form.function), gamma=factor.gamma)
    return PreferenceTerm(link, around, factor.gamma if form.turns else 0.0, clip=guard == "clip")


def _composed(entry: Entry, values: Mapping[str, float], preference: PreferenceTerm) -> Callable[..., PairLosses]:
    """The loss of a Bradley-Terry objective: its preference term and what stands beside it."""
    odds_of, over = _asking(entry.odds, values), _asking(entry.over, values)
    constants_of, beside = _asking(entry.constants, values), _asking(entry.beside, values)

    def loss(policy: PairLogps, **inputs: Any) -> PairLosses:
        odds: Odds = odds_of(policy, **inputs)
        constants = () if constants_of is None else tuple(c.detach() for c in constants_of(policy, **inputs))
        losses = preference(odds.log_odds, *constants)
        made = odds.with_losses(losses if beside is None else losses + beside(policy, **inputs), constants)
        return made if over is None else _over(made, partial(over, policy=policy, **inputs))

    return loss


def _over(made: PairLosses, over: Callable[..., Over]) -> PairLosses:
    """What the step makes of its pairs' own losses: a pair's slope is its own times the step's towards it."""
    with torch.enable_grad():
        own = made.losses.detach().requires_grad_()
        found = over(own)
        [scale] = torch.autograd.grad(found.losses.sum(), own)
    moves = scale * (made.losses - made.losses.detach())
    return made._replace(losses=found.losses.detach() + moves, scale=scale, state=found.state or made.state)


def _asking(place: Function | None, values: Mapping[str, float]) -> Any:
    """The function with its parameters, called with those inputs alone that it names; None for none."""
    if place is None:
        return None
    function = _bound(place, values)
    names = signature(function).parameters
    return lambda first, **inputs: function(first, **{key: inputs[key] for key in inputs.keys() & names})


def _bound(place: Function, values: Mapping[str, float]) -> Callable[..., Any]:
    """The function with the parameters that it names."""
    function = _function(place)
    names = signature(function).parameters
    given = {python_name(key): value for key, value in values.items()}
    return partial(function, **{key: value for key, value in given.items() if key in names})


def _function(place: Function) -> Callable[..., Any]:
    """A function, or `file.function` of this room."""
    if callable(place):
        return place
    file, _, function = place.partition(".")
    return getattr(import_module(f"{__package__}.{file}"), function)


def mean_loss(losses: Tensor, num_pairs: int) -> Tensor:
    """Sum over a pack's pairs divided by the pairs of the whole optimiser step (never a mean of means)."""
    return losses.sum() / num_pairs
