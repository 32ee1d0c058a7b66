"""A run folder as data: the lines of its metrics, its evaluation tables, its manifest, and what is missing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from lorafocal.errors import InputError
from lorafocal.evaluations import FOLDER, EvaluatedPair, evaluation_files, read_evaluation
from lorafocal.lineage import lineage_of
from lorafocal.objectives import Objective, objective_from
from lorafocal.objectives.inputs import PairLogps
from lorafocal.run_folder import ADAPTER_DIR, MANIFEST_FILE, METRICS_FILE, MODEL_DIR, STAGES_FILE, SWEEP_FILE

SWEEP_PAGE = "sweep.html"
_MOST_STEPS = 10**12


class Series(NamedTuple):
    """Values over optimiser steps, in the order of steps; NaN where the run logged a number that is not finite."""

    steps: list[int]
    values: list[float]

    def finite(self) -> Series:
        """Without the steps whose value is not finite."""
        kept = [(step, value) for step, value in zip(*self, strict=True) if math.isfinite(value)]
        return Series([step for step, _ in kept], [value for _, value in kept])


@dataclass(frozen=True, slots=True)
class PairTable:
    """Summed log-probs (nats, float64) of B held-out pairs under policy and reference, after `step` steps."""

    step: int
    policy: PairLogps
    reference: PairLogps


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run left behind, as far as it could be read.

    `lines` are those of `metrics.jsonl`, numbers only, each with its `step`; `notes` say in words what is missing.
    """

    name: str
    lines: Sequence[Mapping[str, float]]
    tables: Sequence[PairTable] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective | None = None  # None where it is unknown
    notes: Sequence[str] = ()

    @property
    def beta(self) -> float | None:
        """The scale of the implicit rewards; None where it is unknown, or the objective has others or none."""
        own = self.objective
        return own.parameters.get("beta") if own is not None and own.entry.implicit_rewards else None

    @property
    def turning_point(self) -> float:
        """The margin below which a step lowers the margin; -inf where none is known of."""
        own = self.objective
        return own.turning_point if own is not None and own.entry.of_margin else -math.inf

    def series(self, key: str) -> Series:
        """Every logged value of `key`; of several at one step the last."""
        by_step = {int(line["step"]): line[key] for line in self.lines if key in line}
        steps = sorted(by_step)
        return Series(steps, [by_step[step] for step in steps])


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The records of run folders, each under a name of its own.

    Raises InputError where a folder is missing, given twice, or holds no metrics to show.
    """
    if not folders:
        raise InputError("no run to report on: give one run folder or more, such as runs/<name>")
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{folders[number]} is given twice; give each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _names(places), strict=True)]


def read_run(folder: Path, name: str) -> RunRecord:
    """The record of one run folder; what is missing beside the metrics becomes a note.

    Raises InputError where there is no metrics file, or none of its lines reports anything.
    """
    lines, notes = _read_metrics(folder)
    manifest = _read_manifest(folder, notes)
    objective = _objective(folder, manifest)
    tables = _read_tables(folder, notes)
    if tables and objective is None:
        notes.append("beta is unknown: margins and gradient weights of single pairs cannot be computed.")
    elif tables and objective is not None and not objective.entry.implicit_rewards:
        notes.append(
            f"{objective.name} does not rank pairs by beta times the log-ratio of whole answers: margins and gradient"
            " weights of single pairs are not shown."
        )
    if _made(folder) is None:
        last = max(int(line["step"]) for line in lines)
        notes.append(
            "The run has no finished adapter or model: it is still going on, or was stopped after step"
            f" {last} or later."
        )
    return RunRecord(name, lines, tables, manifest, objective, notes)


def _made(folder: Path) -> Path | None:
    """The finished adapter, or the finished model of a full-parameter run."""
    return next((place for place in (folder / ADAPTER_DIR, folder / MODEL_DIR) if place.is_dir()), None)


def _names(places: Sequence[Path]) -> list[str]:
    """The folder's name; with its parent's where two are equal; with a number where that is equal too."""
    last = [place.name for place in places]
    names = [place.name if last.count(place.name) == 1 else "/".join(place.parts[-2:]) for place in places]
    names = [name.encode("utf-8", "replace").decode() for name in names]  # a folder's name may be no text
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _read_metrics(folder: Path) -> tuple[list[dict[str, float]], list[str]]:
    """The lines, and notes on them; a torn last line is left out."""
    if (folder / SWEEP_PAGE).is_file():
        raise InputError(f"{folder} is a sweep: its report is {SWEEP_PAGE} there; a run of it is one of its folders")
    if (folder / SWEEP_FILE).is_file():
        raise InputError(
            f"{folder} is a sweep that has not ended: the same `lorafocal sweep` goes on with it, and writes"
            f" {SWEEP_PAGE} there; a run of it is one of its folders"
        )
    if (folder / STAGES_FILE).is_file():
        raise InputError(f"{folder} holds the stages of a run: report on them, {folder}/stage-1 and so on")
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give the folder that `lorafocal train` wrote, runs/<name>")
    if not path.is_file():
        raise InputError(f"{folder} has no {METRICS_FILE}: no run was started there, or it has not logged a step yet")
    rows = path.read_bytes().split(b"\n")
    torn = rows.pop()  # whatever follows the last newline
    lines = [_metrics_line(row, f"{path}, line {number}") for number, row in enumerate(rows, start=1) if row.strip()]
    if not any(len(line) > 1 for line in lines):
        raise InputError(f"{path} holds no logged step yet; the first comes after training.logging_steps steps")
    notes = []
    if torn.strip():
        notes.append(
            f"The last line of {METRICS_FILE} is not whole and was left out (the run is writing it, or was killed)."
        )
    return lines, notes


def _metrics_line(row: bytes, place: str) -> dict[str, float]:
    """The numbers of one line, null as NaN; text that some callback logged is not a number and is left out."""
    try:
        line = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); the file was changed or damaged: remove that line") from None
    step = line.get("step") if isinstance(line, dict) else None
    if not _is_number(step) or not (0 <= step < _MOST_STEPS and step == int(step)):
        raise InputError(f"{place} is not a line of a run: it has no `step`, a whole number; remove that line")
    numbers = {key: value for key, value in line.items() if value is None or _is_number(value)}
    return {key: _number(value) for key, value in numbers.items()}


def _read_manifest(folder: Path, notes: list[str]) -> Mapping[str, Any]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        notes.append(f"There is no {MANIFEST_FILE}: settings, versions and data counts are unknown.")
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
        notes.append(f"{MANIFEST_FILE} cannot be read: settings, versions and data counts are unknown.")
        return {}
    return manifest


def _objective(folder: Path, manifest: Mapping[str, Any]) -> Objective | None:
    """From the manifest, or from what the run made where it was started from Python."""
    objective = manifest.get("config", {}).get("objective")
    if objective is None:
        try:
            lineage = lineage_of(_made(folder) or folder / ADAPTER_DIR)
        except InputError:
            lineage = None
        objective = lineage.objective if lineage else None
    if not isinstance(objective, Mapping):
        return None
    try:
        return objective_from(objective)
    except InputError:  # written by another version, or by hand
        return None


def _read_tables(folder: Path, notes: list[str]) -> list[PairTable]:
    """The evaluation tables in the order of their steps; one that cannot be read becomes a note."""
    tables = []
    for step, path in evaluation_files(folder).items():
        try:
            tables.append(pair_table(step, read_evaluation(path)))
        except InputError as error:
            notes.append(f"{FOLDER}/{path.name} was left out: {str(error).replace(str(path), path.name)}")
    if not tables:
        notes.append(
            "No evaluation left a table of its pairs: there is no histogram of margins, and there are no flips."
            " Held-out pairs (data.eval or data.held_out) bring both, under an objective with a reference."
        )
    return tables


def pair_table(step: int, rows: Sequence[EvaluatedPair]) -> PairTable:
    """The pairs of an evaluation by column. Raises InputError where there are none, or a number is not finite."""
    numbers = [(row.policy_chosen, row.policy_rejected, row.reference_chosen, row.reference_rejected) for row in rows]
    if not numbers or not all(_is_number(value) and math.isfinite(value) for row in numbers for value in row):
        raise InputError("it holds no pair, or log-probs that are not finite numbers")
    columns = torch.tensor(numbers, dtype=torch.float64).unbind(1)
    return PairTable(step, PairLogps(*columns[:2]), PairLogps(*columns[2:]))


def _number(value: float | None) -> float:
    """A logged number; null, and what does not fit a float, as NaN."""
    return math.nan if value is None or not abs(value) < sys.float_info.max else float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
