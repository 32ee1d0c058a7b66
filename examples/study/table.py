"""From what the runs left to `runs.csv`, a row a run, and `prompts.csv`, the right answers of single test questions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from design import Cell, Study
from task import held_out_rows, kind_of

from lorafocal.publish import write_atomically

QUANTILES = (5, 25, 50, 75, 95)  # percent
PARTS = 10_000  # prompts.csv holds probabilities in these
KEY = ("condition", "arm", "grid_rate", "seed")

Sides = Mapping[str, Sequence[float]]
Row = dict[str, Any]
Prompts = dict[tuple[str, str, float, int], np.ndarray]  # by KEY: (test questions,) probabilities of the right answer


def run_row(
    cell: Cell, result: Mapping[str, Any], bases: tuple[Sides, Sides], swapped: Sequence[bool], validation: int
) -> Row:
    """One run's numbers. `bases` are the base's log-probs of held-out pairs and of probes; shares are in [0, 1].

    A right answer's share is its exact probability under the policy at temperature 1, the mean over questions: what
    the share of right sampled answers is in expectation, without the noise of sampling.
    """
    held_out, probes = bases
    kinds = _held_out_kinds(len(held_out["chosen"]))
    right = np.exp(result["held_out"]["chosen"])
    row: Row = {
        "condition": cell.condition.name,
        "arm": cell.arm.name,
        "grid_rate": cell.grid_rate,
        "seed": cell.seed,
        "rate": cell.rate,
        "steps": result["steps"],
        "validation_right": right[:validation].mean(),
        "test_right": right[validation:].mean(),
        **_ranking(_from(result["held_out"], validation), _from(held_out, validation)),
        **_probes(result["probes"], probes, np.asarray(swapped[: len(probes["chosen"])])),
        **{
            name.removeprefix("focal/"): result["logged"].get(name)
            for name in ("focal/ratio_to_dpo", "focal/turned_share")
        },
    }
    for kind in sorted(set(kinds)):
        of_kind = np.asarray([found == kind for found in kinds[validation:]])
        row[f"right {kind}"] = right[validation:][of_kind].mean() if of_kind.any() else None
    return row | {"cpu_s": result["cpu_s"], "wall_s": result["wall_s"]}


@cache
def _held_out_kinds(count: int) -> list[str]:
    return [kind_of(row) for row in held_out_rows(count)]


def base_row(held_out: Sides, validation: int) -> Row:
    """The same numbers of the base, as far as they are any."""
    right = np.exp(held_out["chosen"])
    test = _from(held_out, validation)
    return {
        "arm": "base",
        "validation_right": right[:validation].mean(),
        "test_right": right[validation:].mean(),
        "ranked": (np.asarray(test["chosen"]) > np.asarray(test["rejected"])).mean(),
    }


def _from(sides: Sides, start: int) -> Sides:
    return {side: values[start:] for side, values in sides.items()}


def _ranking(policy: Sides, base: Sides) -> Row:
    """Of test pairs: the shares ranked right, by likelihood and by implicit reward; and displacement in nats."""
    chosen, rejected = _shifts(policy, base)
    right = np.asarray(policy["chosen"]) > np.asarray(policy["rejected"])
    was = np.asarray(base["chosen"]) > np.asarray(base["rejected"])
    return {
        "ranked": right.mean(),
        "ranked_where_right": _mean(right[was]),
        "ranked_where_wrong": _mean(right[~was]),
        "reward_accuracy": (chosen > rejected).mean(),
        "chosen_shift": chosen.mean(),
        "rejected_shift": rejected.mean(),
    }


def _probes(policy: Sides, base: Sides, swapped: np.ndarray) -> Row:
    """Of training pairs, clean and swapped apart: the share ranked as labelled by the implicit reward, and margins.

    Margins are log-ratio differences in nats, of the pair as labelled: beta times them is DPO's log-odds.
    """
    chosen, rejected = _shifts(policy, base)
    margins = chosen - rejected
    row: Row = {}
    for name, of in (("clean", margins[~swapped]), ("swapped", margins[swapped])):
        row[f"{name}_fitted"] = _mean(of > 0)
        found = np.percentile(of, QUANTILES) if len(of) else [None] * len(QUANTILES)
        row |= {f"{name}_margin_{q}": value for q, value in zip(QUANTILES, found, strict=True)}
    return row


def _shifts(policy: Sides, base: Sides) -> tuple[np.ndarray, np.ndarray]:
    """Policy minus base log-probs of chosen and rejected, in nats."""
    chosen, rejected = (np.asarray(policy[side]) - np.asarray(base[side]) for side in ("chosen", "rejected"))
    return chosen, rejected


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# ---- files


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of equal keys; floats to six digits, what is not known empty."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_runs(path: Path) -> list[Row]:
    """What `write_csv` wrote of runs; numbers as numbers, empty ones as None."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value if key in ("condition", "arm") else _number(value) for key, value in row.items()} for row in rows
    ]


def _number(text: str) -> float | None:
    return float(text) if text else None


def write_prompts(path: Path, prompts: Prompts) -> None:
    """A line a run: its key, then each test question's probability in parts of `PARTS`."""
    lines = (",".join((*map(str, key), *map(str, np.rint(PARTS * of).astype(int)))) for key, of in prompts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_prompts(path: Path) -> Prompts:
    found: Prompts = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        condition, arm, rate, seed, *values = line.split(",")
        found[condition, arm, float(rate), int(seed)] = np.asarray(values, dtype=float) / PARTS
    return found


def right_answers(result: Mapping[str, Any], study: Study) -> np.ndarray:
    """Probability of the right answer to each test question, (test,)."""
    return np.exp(result["held_out"]["chosen"][study.pairs.validation :])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
