"""The table that an evaluation leaves: each held-out pair's log-probs under policy and reference, a file a step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lorafocal.errors import InputError, unreadable
from lorafocal.publish import write_atomically

FOLDER = "evaluations"
_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class EvaluatedPair:
    """Summed log-probs of one held-out pair's completions, in nats."""

    id: str
    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float


def evaluation_file(run: Path, step: int, folder: str = FOLDER) -> Path:
    """Where the evaluation after optimiser step `step` lies in the run folder `run`."""
    return run / folder / f"step-{step}.jsonl"


def evaluation_files(run: Path, folder: str = FOLDER) -> dict[int, Path]:
    """The evaluations of a run by optimiser step, in order; empty where there are none."""
    found = [(_FILE.fullmatch(path.name), path) for path in (run / folder).glob("step-*.jsonl")]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def write_evaluation(path: Path, rows: Iterable[EvaluatedPair]) -> None:
    """One JSON object a pair, a line each, complete or absent. Numbers read back to the same bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_evaluation(path: Path) -> list[EvaluatedPair]:
    """What `write_evaluation` wrote. Raises InputError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # an id may hold what `splitlines` splits at
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            rows.append(EvaluatedPair(**{field.name: record[field.name] for field in fields(EvaluatedPair)}))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}:{number} is not a pair of an evaluation ({type(error).__name__}: {error}). Remove the file;"
                " the run writes it again at its next evaluation"
            ) from error
    return rows


def drop_later(run: Path, step: int, folder: str = FOLDER, *, keep_first: bool = False) -> None:
    """Remove the evaluations of steps after `step`: the files are those of the weights.

    At step 0 all of them, but with `keep_first` that of the weights before the first step.
    """
    for at, path in evaluation_files(run, folder).items():
        if at > step or (step == 0 and not keep_first):
            path.unlink()
