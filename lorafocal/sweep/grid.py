"""The grid of a sweep: its axes, checked as a whole, and a named run a point."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.config import load_config
from lorafocal.errors import InputError
from lorafocal.publish import text_sha256
from lorafocal.report.sweep_results import ACCURACY, LOSS, Criterion, Point, number_word, value_text
from lorafocal.resume import MAY_CHANGE
from lorafocal.schema import Config
from lorafocal.yaml12 import parse_yaml

MOST_RUNS = 1000

FIXED = {
    "name": "each run is named by its values",
    "model": "rewards are relative to the base: runs of two bases answer different questions. A sweep each, and"
    " `lorafocal score` on one file of pairs",
    "reference": "rewards are relative to the reference: runs with two of them cannot be compared",
    "adapter.start_from": "the reference is the start that is given: runs from two starts cannot be compared",
    "packing": "it changes memory and speed, never the result",
    "kernels": "it changes memory and speed, never the result",
    "training.activation_checkpointing": "it changes memory and speed, never the result",
    "stages": "a run of a sweep is one stage",
    "data": "it decides which held-out pairs there are, and in what form: the runs would be measured on different ones",
}
"""Keys and sections that a grid may not vary, with the reason; `data.train` may, beside held-out pairs of their own,
and steps, which leave held-out pairs alone."""

# How keys stand in the names of run folders, where not by their last part.
SHORT = {
    "training.learning_rate": "lr",
    "training.num_train_epochs": "epochs",
    "training.max_steps": "steps",
    "training.pairs_per_step": "pairs",
    "training.warmup_ratio": "warmup",
    "training.weight_decay": "decay",
    "training.data_seed": "order",
    "objective.name": "",
    "data.train": "",
}
_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """A point and the config of its run."""

    point: Point
    config: Config


@dataclass(frozen=True, slots=True)
class Grid:
    """What one call asks for: the values of each axis, and every point of them, the last axis fastest."""

    name: str
    axes: Mapping[str, Sequence[Any]]
    points: tuple[Planned, ...]
    file: Path
    overrides: tuple[str, ...]

    @classmethod
    def read(cls, file: str | Path, grid: Sequence[str], overrides: Sequence[str] = ()) -> Grid:
        """The grid of `key=value,value` texts over a config. Raises one InputError for all mistakes in its points."""
        axes = parse_grid(grid)
        check_axes(axes, overrides)
        named: list[tuple[str, Planned]] = []
        mistakes: Counter[str] = Counter()
        for values in itertools.product(*axes.values()):
            try:
                named.append(_plan(Path(file), overrides, dict(zip(axes, values, strict=True))))
            except InputError as error:
                _, *lines = str(error).splitlines()
                mistakes.update(map(str.strip, lines) if lines else [str(error)])
        if mistakes:
            of = f"of {_count(axes)} points"
            lines = [f"{line}  ({count} {of})" for line, count in mistakes.items()]
            raise InputError("\n  ".join([f"{file}: this grid has mistakes, and nothing was run", *lines]))
        points = tuple(planned for _, planned in named)
        _check_different([planned.point for planned in points])
        _check_held_out(file, axes, points[0].config)
        for planned in points:
            _check_alone(planned.config)
        return cls(named[0][0], axes, points, Path(file), tuple(overrides))

    def plan(self, values: Mapping[str, Any]) -> Planned:
        """A point of other values over the same config. Raises InputError where they do not fit it."""
        return _plan(self.file, self.overrides, values)[1]


def _plan(file: Path, overrides: Sequence[str], values: Mapping[str, Any]) -> tuple[str, Planned]:
    """The name of the config, and the point whose run is named by its values instead."""
    slug = slug_of(values)
    config = load_config(file, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])
    point = Point(slug, dict(values), identity_of(config))
    return config.name, Planned(point, config.model_copy(update={"name": slug}))


def _check_different(points: Sequence[Point]) -> None:
    """Refuse two points that are the same run. Raises InputError."""
    seen: dict[str, Point] = {}
    for point in points:
        for mark in (point.slug, point.identity):
            if mark in seen:
                raise InputError(f"two points of the grid are the same run: {_both(seen[mark], point)}; leave one out")
        seen |= {point.slug: point, point.identity: point}


def _check_alone(config: Config) -> None:
    """Refuse what a sweep, which is one process with its libraries loaded, cannot run. Raises InputError."""
    if config.stages is not None:
        raise InputError(
            "stages: a run of a sweep is one stage: leave it out (stages=null), or use `lorafocal train` for each"
        )
    if config.engine is not None and config.engine.kind != "ddp":
        raise InputError(
            f"engine.kind: {config.engine.kind} is for several processes, and a sweep is one: leave it out"
            " (engine=null), or use `lorafocal train` for each"
        )
    if config.model.backend != "transformers":
        raise InputError(
            f"model.backend: {config.model.backend} trains one run a process, and a sweep is one process: use"
            " `lorafocal train` for each"
        )


def _check_held_out(file: str | Path, axes: Mapping[str, Any], config: Config) -> None:
    """Refuse a sweep without pairs to choose by, or with other ones for each run. Raises InputError."""
    if config.data.eval is None and config.data.held_out is None:
        raise InputError(
            f"{file}: a sweep chooses by held-out pairs, and there are none: give data.held_out=0.05, or data.eval=FILE"
        )
    if "data.train" in axes and config.data.eval is None:
        raise InputError("--grid data.train: held-out pairs would come from each file itself; give data.eval=FILE")


# ---- axes


def parse_grid(grid: Sequence[str]) -> dict[str, list[Any]]:
    """`key=value,value` each, to the values of each key; a value is read as YAML, so that 3e-7 is a number."""
    axes: dict[str, list[Any]] = {}
    for text in grid:
        key, separator, listed = (part.strip() for part in text.partition("="))
        if not separator or not key or not listed:
            raise InputError(
                f"{text!r} is no axis of a grid; write key=value,value as training.learning_rate=3e-7,1e-6"
            )
        if key in axes:
            raise InputError(f"--grid {key} is given twice; list its values once, as {key}=value,value")
        axes[key] = _values_of(key, listed)
    if not axes:
        raise InputError("a sweep needs --grid: for example --grid training.learning_rate=3e-7,5e-7,1e-6")
    return axes


def _values_of(key: str, listed: str) -> list[Any]:
    """The values that stand behind the `=` of an axis. Raises InputError."""
    wrong = f"--grid {key}: {listed!r} is no list of values; write value,value, each bracket and quote closed"
    try:
        values = parse_yaml(f"[{listed}]", source=f"--grid {key}")
    except InputError as error:
        empty = re.search(r"(^|,)\s*,", listed)
        raise InputError(
            f"--grid {key}: a value is missing in {listed!r}; write one comma between two" if empty else wrong
        ) from error
    if not isinstance(values, list) or not values:
        raise InputError(wrong)
    return values


def check_axes(axes: Mapping[str, Sequence[Any]], overrides: Sequence[str]) -> None:
    """Refuse, all at once, the keys that a sweep cannot vary."""
    given = {override.partition("=")[0].strip() for override in overrides}
    problems = []
    for key in axes:
        if key in given:
            problems.append(f"{key}: it is given as an override too, which the grid would replace; leave one out")
        elif key in MAY_CHANGE:
            problems.append(f"{key}: all its values give the same adapter ({MAY_CHANGE[key]})")
        elif reason := _why_fixed(key):
            problems.append(f"{key}: {reason}")
        elif key in Config.model_fields:
            problems.append(f"{key}: it is a whole section; vary keys inside it, as {key}.<key>=value,value")
    if problems:
        raise InputError("\n  ".join(["this grid cannot be swept:", *problems]))
    if (count := _count(axes)) > MOST_RUNS:
        raise InputError(f"the grid has {count:,} points; a sweep has at most {MOST_RUNS:,}")


def _why_fixed(key: str) -> str | None:
    of_training_pairs = key.startswith("data.steps.") and ".pairs." not in key
    if key == "data.train" or of_training_pairs:
        return None
    return next((reason for fixed, reason in FIXED.items() if key == fixed or key.startswith(f"{fixed}.")), None)


def _count(axes: Mapping[str, Sequence[Any]]) -> int:
    count = 1
    for values in axes.values():
        count *= len(values)
    return count


# ---- names


def _both(one: Point, other: Point) -> str:
    """The values in which two points differ as they were written, or the values they share."""
    differ = [key for key in one.values if repr(one.values[key]) != repr(other.values[key])]
    return " and ".join(
        ", ".join(f"{key}={json.dumps(point.values[key])}" for key in differ or point.values) for point in (one, other)
    )


def slug_of(values: Mapping[str, Any]) -> str:
    """A run's name from its values, `lr3e-7-gamma0.05-seed1`: the same whatever else is in the grid."""
    parts, exact = [], True
    for key, value in values.items():
        word = SHORT.get(key, key.rpartition(".")[2].replace("_", "-"))
        text, whole = _word_of(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        parts.append(f"{word}{text}" if number else "-".join(filter(None, (word, text))))
        exact &= whole
    slug = "-".join(parts).lower().lstrip("._-")
    if exact and len(slug) <= _LONGEST_NAME:
        return slug
    digest = text_sha256(json.dumps(dict(values), sort_keys=True))[:6]
    return f"{slug[: _LONGEST_NAME - 7].rstrip('._-')}-{digest}"


def _word_of(value: Any) -> tuple[str, bool]:
    """A value as part of a file name, and whether it still says which value it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_word(value), True
    text = value.rpartition("/")[2] if isinstance(value, str) else value_text(value)
    word = re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")
    return word, word == value or not isinstance(value, str | list | dict)


def identity_of(config: Config) -> str:
    """sha256 (hex) of what decides a run's result: all of the config but its name and what may change on resume."""
    return text_sha256(json.dumps(_deciding(config), sort_keys=True))


def _deciding(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude={"evaluation"})  # each key of which may change
    for key in ("name", *MAY_CHANGE):
        section, _, last = key.rpartition(".")
        (values.get(section, {}) if section else values).pop(last, None)
    return values


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; None where the config leaves it to a default elsewhere."""
    place: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if isinstance(place, list):
            place = place[int(part)] if part.isdecimal() and int(part) < len(place) else None
        else:
            place = place.get(part) if isinstance(place, dict) else None
    return place


# ---- what decides


def choose_criterion(best: str | None, varied: Collection[str], config: Config) -> Criterion:
    """What the best is chosen by, over a grid of these keys; losses of different objectives are never compared.

    Raises InputError for a criterion that is not known, not measured, or not comparable over this grid.
    """
    scales = [key.rpartition(".")[2] for key in varied if key.startswith("objective.")]
    why_not = f"losses of different {' and '.join(scales)} are on different scales"
    if best not in (None, LOSS, ACCURACY):
        raise InputError(f"--best is {best!r}; choose {LOSS}, or {ACCURACY}")
    if best == LOSS and scales:
        raise InputError(f"--best {LOSS}: {why_not}; use {ACCURACY}")
    if best == ACCURACY and not config.objective.entry.rejected:
        raise InputError(f"--best {ACCURACY}: {config.objective.name} ranks no pairs, so it has none; use {LOSS}")
    if best is not None:
        return Criterion(best, "as asked")
    return Criterion(ACCURACY, why_not) if scales else Criterion(LOSS, "one objective in all runs")
