"""A study as its file says it: conditions, arms, learning rates and seeds, and every run that follows from them.

Imports no torch, so that a mistake in the file is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.publish import check_name
from lorafocal.yaml12 import parse_yaml


@dataclass(frozen=True, slots=True)
class Arm:
    """An objective as a config has it; `rate_factor` multiplies every learning rate of the grid."""

    name: str
    objective: Mapping[str, Any]
    rate_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Condition:
    """Training pairs of which a share is swapped, drawn anew for each seed."""

    name: str
    noise: float
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """How many there are: of training, held-out validation and test, and training pairs that are looked at after."""

    training: int
    validation: int
    test: int
    probes: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: its name is also its run folder's. `grid_rate` is the learning rate before the arm's factor."""

    condition: Condition
    arm: Arm
    grid_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.condition.name}-{self.arm.name}-rate{self.grid_rate:g}-seed{self.seed}"

    @property
    def rate(self) -> float:
        return self.grid_rate * self.arm.rate_factor


@dataclass(frozen=True, slots=True)
class Study:
    """`primary` names a condition; `contrast` is (arm, against), `secondary` more of them, all at each arm's best rate.

    `published_rate` is what the paper's protocol gives DPO; `equivalence` is a difference in points of right answers
    that would not matter.
    """

    base: Mapping[str, Any]  # a `ToyRecipe`
    pairs: Pairs
    conditions: tuple[Condition, ...]
    primary: str
    rates: tuple[float, ...]
    arms: tuple[Arm, ...]
    contrast: tuple[str, str]
    secondary: tuple[tuple[str, str], ...]
    published_rate: float
    equivalence: float

    def cells(self) -> Iterator[Cell]:
        """Every run; seed after seed, so that a study that was stopped early has fewer seeds of everything."""
        seeds = sorted({seed for condition in self.conditions for seed in condition.seeds})
        for seed in seeds:
            for condition in self.conditions:
                if seed in condition.seeds:
                    yield from (Cell(condition, arm, rate, seed) for arm in self.arms for rate in self.rates)

    def condition(self, name: str) -> Condition:
        return next(condition for condition in self.conditions if condition.name == name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def read_study(path: Path) -> Study:
    """The study in a YAML file. Raises InputError for a file that is none, naming the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the study {path}: {error.strerror}") from error
    values = parse_yaml(text, source=str(path))
    expected = {field.name for field in fields(Study)}
    if not isinstance(values, dict) or values.keys() != expected:
        given = set(values) if isinstance(values, dict) else set()
        raise InputError(f"{path}: missing or unknown keys: {', '.join(sorted(expected ^ given))}")
    try:
        study = _study(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no study: {error}") from error
    _check(study, path)
    return study


def _study(values: Mapping[str, Any]) -> Study:
    conditions = tuple(
        Condition(name, float(of["noise"]), tuple(range(of["first_seed"], of["first_seed"] + of["seeds"])))
        for name, of in values["conditions"].items()
    )
    arms = tuple(
        Arm(name, {key: value for key, value in of.items() if key != "rate_factor"}, float(of.get("rate_factor", 1)))
        for name, of in values["arms"].items()
    )
    first, against = values["contrast"]
    secondary = tuple((one, other) for one, other in values["secondary"])
    return Study(
        base=values["base"],
        pairs=Pairs(**values["pairs"]),
        conditions=conditions,
        primary=values["primary"],
        rates=tuple(map(float, values["rates"])),
        arms=arms,
        contrast=(first, against),
        secondary=secondary,
        published_rate=float(values["published_rate"]),
        equivalence=float(values["equivalence"]),
    )


def _check(study: Study, path: Path) -> None:
    known = {arm.name for arm in study.arms}
    if lost := sorted({name for pair in (study.contrast, *study.secondary) for name in pair} - known):
        raise InputError(f"{path}: contrasts name arms that there are none of: {', '.join(lost)}")
    if lost := sorted({"dpo", "focal-hard-1"} - known):
        raise InputError(f"{path}: arms: the paper's protocol needs {', '.join(lost)}")
    if study.primary not in {condition.name for condition in study.conditions}:
        raise InputError(f"{path}: primary: {study.primary!r} is none of the conditions")
    if study.published_rate not in study.rates:
        raise InputError(f"{path}: published_rate: {study.published_rate:g} is none of the rates")
    if not 0 < study.pairs.probes <= study.pairs.training:
        raise InputError(f"{path}: pairs.probes: {study.pairs.probes}; they are among the training pairs")
    if any(len(condition.seeds) < 2 for condition in study.conditions):
        raise InputError(f"{path}: conditions: a comparison needs 2 seeds or more in each")
    for cell in study.cells():
        check_name(cell.name)
