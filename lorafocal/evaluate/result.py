"""What an evaluation found: numbers with their intervals, and everything that a reader needs to trust them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError, unreadable
from lorafocal.publish import check_folder_of, sha256, text_sha256, write_atomically
from lorafocal.versions import installed

FORMAT = 1
BENCHMARKS = (
    "alpaca_eval_2",
    "arena_hard_v0.1",
    "open_llm_leaderboard_1",
    "rule",
    "reward_model",
    "pairs",
    "fingerprint",
    "comparison",
)
ANNOTATIONS, TASKS = "annotations.json", "tasks.json"  # kept beside a result, and JSON as it is


@dataclass(frozen=True, slots=True)
class Score:
    """A number, its 95% interval and its standard error, where known; win rates and accuracies in percent."""

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "standard_error"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InputError(f"a score's {name} is a finite number, not {number!r}")

    def __str__(self) -> str:
        """`67.17 [63.31, 70.81]`, or with its standard error alone `67.17 (standard error 1.92)`."""
        text = _short(self.value)
        if self.low is not None and self.high is not None:
            return f"{text} [{_short(self.low)}, {_short(self.high)}]"
        return text if self.standard_error is None else f"{text} (standard error {_short(self.standard_error)})"


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of one model; every value is of JSON's kinds.

    `benchmark` is one of BENCHMARKS. `sampling` and `target` come from the provenance of the answers; None where
    that is not known. `inputs` holds the sha256 of every file that was read, by its name (`file_hashes`). `notes`
    are the sentences without which a number would mislead. `items` has one mapping a prompt or a pair: its
    `prompt_sha256` and its verdict, never a text: `right`, `preference` (for the model, in [0, 1]) or `score`, None
    where there is none.
    `details` are tables beside the scores by their name, each a list of rows with the same keys.
    """

    benchmark: str
    model: str
    scores: Mapping[str, Score]
    judge: str | None = None
    sampling: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    items: tuple[Mapping[str, Any], ...] = ()
    details: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise InputError(f"benchmark is one of {', '.join(BENCHMARKS)}, not {self.benchmark!r}")

    def as_dict(self) -> dict[str, Any]:
        """A JSON object; what a score does not have is left out."""
        scores = {
            name: {key: value for key, value in asdict(score).items() if value is not None}
            for name, score in self.scores.items()
        }
        return {"format": FORMAT} | {each.name: getattr(self, each.name) for each in fields(self)} | {"scores": scores}

    def table(self) -> str:
        """The numbers for a person, one a line, and the notes below."""
        head = [("benchmark", self.benchmark), ("model", self.model)]
        if self.judge is not None:
            head.append(("judge", self.judge))
        numbers = [(name, str(score)) for name, score in self.scores.items()]
        counts = [(name, str(count)) for name, count in self.counts.items()]
        rows = [*head, *numbers, *counts]
        width = 2 + max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}{value}" for name, value in rows]
        for name, table in self.details.items():
            lines += ["", f"{name}:", *_columns(table)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def write(self, path: Path) -> None:
        """The same result gives the same bytes: no time, no host, no place on this machine."""
        record = self.as_dict()
        for text in _strings(record):
            if text.startswith("/") and Path(text).exists():
                raise InputError(f"a result names no place on this machine, but would name {text}: give its last part")
        check_folder_of(path)
        write_atomically(path, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def beside(result: Path, what: str) -> Path:
    """Where an evaluation keeps something, as `TASKS`, beside the file of its result."""
    return result.with_name(f"{result.stem}.{what}")


def results_among(files: Sequence[Path]) -> list[Path]:
    """`files` without what was kept beside others of them: `results/*.json` names all."""
    kept = {beside(file, what) for file in files for what in (ANNOTATIONS, TASKS)}
    return [file for file in files if file not in kept]


def read_result(path: Path) -> Result:
    """What `Result.write` wrote. Raises InputError naming file and key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); an evaluation writes it by --out") from error
    if not isinstance(record, dict) or "benchmark" not in record:
        raise InputError(f"{path} is not a result: it has no key benchmark. An evaluation writes results by --out")
    if record.get("format") != FORMAT:
        raise InputError(f"{path}: format is {record.get('format')!r}; this lorafocal reads {FORMAT}")
    missing = [each.name for each in fields(Result) if each.name not in record]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}: run its evaluation again")
    _check_shapes(path, record)
    values = {each.name: record[each.name] for each in fields(Result)}
    values |= {"notes": tuple(record["notes"]), "items": tuple(record["items"])}
    values["scores"] = {name: _read_score(path, name, score) for name, score in record["scores"].items()}
    try:
        return Result(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def prompt_sha256(instruction: str) -> str:
    """What an item calls its prompt: the digest of the instruction."""
    return text_sha256(instruction)


def file_hashes(*paths: Path) -> dict[str, str]:
    """A result's `inputs`: each file's sha256 by its name, numbered (`name (2)`) where two share one."""
    hashes: dict[str, str] = {}
    for path in paths:
        alike = sum(name == path.name or name.startswith(f"{path.name} (") for name in hashes)
        hashes[f"{path.name} ({alike + 1})" if alike else path.name] = sha256(path)
    return hashes


def package_versions(*packages: str) -> dict[str, str]:
    """A result's `versions`: those of lorafocal and of the named packages that are installed."""
    return {package: found for package in ("lorafocal", *packages) if (found := installed(package)) is not None}


def _read_score(path: Path, name: str, record: Any) -> Score:
    try:
        return Score(**record)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: scores.{name} is no score ({error}); an evaluation writes one") from error


def _check_shapes(path: Path, record: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "benchmark": (str,),
        "model": (str,),
        "judge": (str, type(None)),
        "notes": (list,),
        "items": (list,),
        "sampling": (dict, type(None)),
        "target": (dict, type(None)),
        **dict.fromkeys(("scores", "counts", "settings", "inputs", "versions", "details"), (dict,)),
    }
    for key, allowed in kinds.items():
        if not isinstance(record[key], allowed):
            raise InputError(f"{path}: {key} is a {type(record[key]).__name__}, which no evaluation writes")
    for key, rows in {"items": record["items"], **record["details"]}.items():
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            if not isinstance(row, dict):
                raise InputError(f"{path}: {key}[{number}] is a {type(row).__name__}, which no evaluation writes")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table's heading and rows, every column as wide as its widest cell."""
    headings = list(table[0]) if table else []
    cells = [[_cell(row.get(key, "")) for key in headings] for row in table]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    return [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in [headings, *cells]
    ]


def _cell(value: Any) -> str:
    return _short(value) if isinstance(value, float) else str(value)


def _short(number: float) -> str:
    """Two decimals as the field prints percentages; small numbers keep three digits."""
    return f"{number:.2f}" if abs(number) >= 1 or number == 0 else f"{number:#.3g}"
