"""What a sweep found: its points, settings as means over seeds, and the best of them by a stated criterion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_file, read_evaluation
from lorafocal.objectives import objective_from
from lorafocal.objectives.pairwise import rewards
from lorafocal.report.read import pair_table

LOSS, ACCURACY, MARGIN = "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"
DISPLACEMENT = "displacement"  # of chosen answers: policy minus reference, nats a completion
SEEDS = ("training.seed", "training.data_seed")
TOLD_APART = 2.0  # standard errors of a difference

Status = Literal["finished", "failed", "refused", "interrupted", "running", "waiting"]


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep: where it lies in the sweep's folder, its value of each axis, and what came of it.

    `identity` is the digest of all that decides its result. `held_out` are the `eval_` metrics of the finished adapter.
    """

    slug: str
    values: Mapping[str, Any]
    identity: str
    status: Status = "waiting"
    reason: str = ""  # of failed and refused runs
    steps: int = 0
    held_out: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Criterion:
    """What the best is chosen by, and why by that."""

    key: str
    why: str

    @property
    def lower_is_better(self) -> bool:
        return self.key == LOSS

    def __str__(self) -> str:
        return f"{self.key} ({'lowest' if self.lower_is_better else 'highest'}; {self.why})"


@dataclass(frozen=True, slots=True)
class Setting:
    """The points that differ by their seeds alone."""

    values: Mapping[str, Any]
    points: tuple[Point, ...]

    @property
    def finished(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.status == "finished")

    def measured(self, key: str) -> list[float]:
        """The finite values of a metric, one a finished point."""
        return [value for point in self.finished if math.isfinite(value := metric(point, key))]

    def mean(self, key: str) -> float | None:
        values = self.measured(key)
        return fmean(values) if values else None

    def spread(self, key: str) -> float | None:
        """Standard deviation over seeds (n - 1); None below two."""
        values = self.measured(key)
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True, slots=True)
class Rival:
    """A setting that this sweep cannot tell from the best: its mean minus the best's, and the error of that."""

    setting: Setting
    difference: float
    error: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The best setting, the best of its points, and the settings that are level with it."""

    setting: Setting
    point: Point
    level: tuple[Rival, ...]


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A sweep as far as it got. `objective` is that of all points, where no axis varies it."""

    name: str
    folder: Path
    criterion: Criterion
    axes: Mapping[str, Sequence[Any]]
    objective: Mapping[str, Any]
    points: Sequence[Point]

    def of(self, *states: Status) -> list[Point]:
        return [point for point in self.points if point.status in states]


def written(value: Any) -> str:
    """A value in one way of writing it: 1 and 1.0 are the same, 1 and true are not."""
    return repr(float(value)) if type(value) is int else repr(value)


def varied(points: Sequence[Point]) -> list[str]:
    """The axes on which points have more than one value."""
    keys = points[0].values
    return [key for key in keys if len({written(point.values[key]) for point in points}) > 1]


def metric(point: Point, key: str) -> float:
    """A held-out metric of a point, NaN where it was not measured."""
    if key == DISPLACEMENT:
        policy, reference = (
            point.held_out.get(f"eval_logps/{side}", math.nan) for side in ("chosen", "reference_chosen")
        )
        return policy - reference
    return point.held_out.get(key, math.nan)


def settings(points: Sequence[Point]) -> list[Setting]:
    """Points by their values beside the seeds, in the order of their first points."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        key = str(sorted((axis, written(value)) for axis, value in _beside_seeds(point).items()))
        groups.setdefault(key, []).append(point)
    return [Setting(_beside_seeds(group[0]), tuple(group)) for group in groups.values()]


def choose(sweep: SweepRecord) -> Choice | None:
    """The best of the settings whose every point has finished with a finite value; None where there is none.

    A setting that failed with one seed is never chosen by the seeds that survived. Of exact equals the first is taken.
    """
    key, sign = sweep.criterion.key, 1.0 if sweep.criterion.lower_is_better else -1.0
    whole = [setting for setting in settings(sweep.points) if len(setting.measured(key)) == len(setting.points)]
    ranked = sorted(whole, key=lambda setting: sign * fmean(setting.measured(key)))  # stable
    if not ranked:
        return None
    best, *others = ranked
    rivals = [_rival(best, other, sweep) for other in others]
    level = tuple(rival for rival in rivals if abs(rival.difference) <= TOLD_APART * rival.error)
    return Choice(best, min(best.points, key=lambda point: sign * metric(point, key)), level)


def _rival(best: Setting, other: Setting, sweep: SweepRecord) -> Rival:
    """How far apart two settings are, and the standard error of that: by the held-out pairs, and by the seeds."""
    key = sweep.criterion.key
    difference = fmean(other.measured(key)) - fmean(best.measured(key))
    variance = sum((setting.spread(key) or 0.0) ** 2 / len(setting.points) for setting in (best, other))
    ours, theirs = (_pair_means(setting, sweep) for setting in (best, other))
    if ours is not None and theirs is not None and len(ours) == len(theirs) > 1:
        variance += float((theirs - ours).var()) / len(ours)
    return Rival(other, difference, math.sqrt(variance))


def _pair_means(setting: Setting, sweep: SweepRecord) -> Tensor | None:
    """The criterion of each held-out pair, a mean over seeds, (B,); None where a run left no table of its pairs."""
    tables = [pair_scores(point, sweep) for point in setting.points]
    found = [table for table in tables if table is not None and table.shape == getattr(tables[0], "shape", None)]
    return torch.stack(found).mean(0) if len(found) == len(tables) else None


def pair_scores(point: Point, sweep: SweepRecord) -> Tensor | None:
    """Loss or correctness of each held-out pair at the end of a run, (B,) float64; None without a table that tells it.

    The loss is the objective's, which all points share where the loss is the criterion; correctness has no scale.
    """
    try:
        table = pair_table(point.steps, read_evaluation(evaluation_file(sweep.folder / point.slug, point.steps)))
    except InputError:
        return None
    both = table.policy, table.reference
    if not sweep.criterion.lower_is_better:
        chosen, rejected = rewards(*both, beta=1.0)
        return (chosen > rejected).double()
    objective = objective_from(sweep.objective)
    return objective(*both).losses if objective.entry.of_logps else None


def values_text(values: Mapping[str, Any], axes: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    """`learning_rate 5e-7, gamma 0.05` in the order of the axes."""
    return ", ".join(
        f"{axis_label(key, axes)} {value_text(values[key])}" for key in axes if key in values and key not in leave_out
    )


def axis_label(key: str, axes: Mapping[str, Any]) -> str:
    """The last part of a key where that is the key of one axis only."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in axes) == 1 else key


def value_text(value: Any) -> str:
    """A value of an axis as a person writes it: 5e-7, 0.05, all-linear, default for what is left out."""
    if value is None:
        return "default"
    if isinstance(value, float):
        return number_word(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_word(value: float) -> str:
    """The shortest text that is read as this number: 5e-7, 0.05, 1."""
    number = Decimal(repr(value)).normalize()
    return f"{number:f}" if number == 0 or 1e-3 <= abs(value) < 1e6 else f"{number:e}".replace("e+", "e")


def _beside_seeds(point: Point) -> dict[str, Any]:
    return {key: value for key, value in point.values.items() if key not in SEEDS}
