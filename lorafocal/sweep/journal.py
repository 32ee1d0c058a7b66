"""`sweep.json`: what a sweep was asked and what came of it, written anew after each change, whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.publish import write_atomically
from lorafocal.report.sweep_page import best_dict
from lorafocal.report.sweep_results import Point, SweepRecord, choose, varied, written
from lorafocal.resume import IDENTITY, MAY_CHANGE, changed_inputs, changes
from lorafocal.run_folder import MANIFEST_FILE, SWEEP_FILE, read_manifest
from lorafocal.sweep.grid import Grid, Planned, choose_criterion, value_of


class Journal:
    """The points of a sweep in the order they were asked for, those of earlier calls among them."""

    def __init__(self, folder: Path, grid: Grid, best: str | None) -> None:
        self.folder, self.grid = folder, grid
        self.axes = {key: list(values) for key, values in grid.axes.items()}
        self.config: Mapping[str, Any] = grid.points[0].config.model_dump(mode="json")  # of the first point
        self.inputs: Mapping[str, Any] | None = None  # fingerprints of models and pairs, as the first run found them
        self.entries: dict[str, Planned] = {}  # by identity
        if (folder / SWEEP_FILE).exists():
            self._take_up(_read(folder / SWEEP_FILE))
        for entry in grid.points:
            self._add(entry)
        self.criterion = choose_criterion(best, varied(self._points()), grid.points[0].config)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        """The earlier calls' points, each made again from the config as it is now, which must give the same run."""
        points = [Point(**record) for record in saved["points"]]
        if not any((self.folder / point.slug).is_dir() for point in points):
            return  # nothing was trained yet: the config may be another
        self.config, self.inputs = saved["config"], saved["inputs"]
        asked = {entry.point.identity for entry in self.grid.points}
        for point in points:
            if point.identity in asked or (self.folder / point.slug).is_dir():
                entry = self._made_again(point)
                self.entries[point.identity] = Planned(_as_left(point, self.folder), entry.config)
        for key, values in saved["axes"].items():
            ours = self.axes.setdefault(key, [])
            ours += [value for value in values if written(value) not in map(written, ours)]

    def _made_again(self, point: Point) -> Planned:
        """A point of an earlier call over the config as it is now. Raises InputError where it is another run."""
        try:
            entry = self.grid.plan(point.values)
        except InputError as error:
            raise self._other_config(f"{point.slug} cannot be run by it any more: {error}") from error
        if entry.point.identity != point.identity:
            now = entry.config.model_dump(mode="json")
            told = changes(self.config, now, {"name", *MAY_CHANGE, *point.values})
            raise self._other_config(*(told or [f"{point.slug} was another run"]))
        return entry

    def _other_config(self, *why: str) -> InputError:
        head = f"{self.folder} is a sweep of another config, and its runs would not be comparable:"
        return InputError("\n  ".join([head, *why]) + "\nset it back, or give this sweep another `name`")

    def _add(self, entry: Planned) -> None:
        """Take up a point of this grid; one that is known keeps its name and what came of it."""
        if entry.point.identity in self.entries:
            return
        if entry.point.slug in {known.point.slug for known in self.entries.values()}:
            raise InputError(f"{entry.point.slug} is in this sweep already, with its value written in another way")
        self.entries[entry.point.identity] = entry

    def entry(self, identity: str) -> Planned:
        return self.entries[identity]

    def note(self, identity: str, **changes_: Any) -> Point:
        """Change what is known of a point, on disk too."""
        entry = self.entries[identity]
        self.entries[identity] = replace(entry, point=replace(entry.point, **changes_))
        self.save()
        return self.entries[identity].point

    def same_inputs(self, manifest: Mapping[str, Any]) -> tuple[str, ...]:
        """No notes; refuses a run whose models or pairs are not those of the runs before it. Raises InputError."""
        if self.inputs is None:
            return ()
        before, found = self.inputs, manifest
        if any(axis == "data.train" or axis.startswith("data.steps.") for axis in self.axes):
            before, found = ({**inputs, "data": {"eval": inputs["data"]["eval"]}} for inputs in (before, found))
        if told := changed_inputs(before, found):
            head = "its inputs are not those of the runs before it, so it could not be compared with them:"
            objectives = (
                "; objectives that read more of the rows than others (scores, groups, further answers) need sweeps of"
                " their own"
            )
            raise InputError(
                "\n  ".join([head, *told])
                + "\nput them back, or start a sweep under another `name`"
                + objectives * ("objective.name" in self.axes)
            )
        return ()

    def keep_inputs(self, identity: str) -> None:
        """Those of the first run that ended are what the others must have; on disk with the run's outcome."""
        if self.inputs is None:
            manifest = read_manifest(self.folder / self.entries[identity].point.slug)
            self.inputs = {name: manifest.get(name) for name in IDENTITY}

    def record(self) -> SweepRecord:
        """The sweep as reports show it."""
        objective = self.config["objective"]
        return SweepRecord(self.grid.name, self.folder, self.criterion, self.axes, objective, self._points())

    def _points(self) -> list[Point]:
        """Every point with its value of every axis, those of other calls among them."""
        return [
            replace(point, values={key: point.values.get(key, value_of(config, key)) for key in self.axes})
            for point, config in ((entry.point, entry.config) for entry in self.entries.values())
        ]

    def save(self) -> None:
        record = self.record()
        content = {
            "format": 1,
            "name": record.name,
            "criterion": {"key": self.criterion.key, "why": self.criterion.why},
            "axes": self.axes,
            "best": best_dict(choose(record)),
            "points": [entry.point.as_dict() for entry in self.entries.values()],
            "inputs": self.inputs,
            "config": self.config,
        }
        write_atomically(self.folder / SWEEP_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def held_out_metrics(logged: Mapping[str, Any]) -> dict[str, float]:
    """The finite `eval_` metrics of a log, without what the machine did."""
    return {
        key: float(value)
        for key, value in logged.items()
        if key.startswith("eval_")
        and not key.endswith(("_runtime", "_per_second"))
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def _as_left(point: Point, folder: Path) -> Point:
    """What can be relied on of a point: one whose folder is gone runs again, one that was killed was interrupted."""
    if not (folder / point.slug / MANIFEST_FILE).exists():
        return replace(point, status="waiting", reason="", steps=0, held_out={})
    return replace(point, status="interrupted") if point.status == "running" else point


def _read(file: Path) -> Mapping[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["format"] != 1 or not {"axes", "points", "inputs", "config"} <= saved.keys():
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read as a sweep ({error}); put it back, or move its folder away") from error
    return saved
