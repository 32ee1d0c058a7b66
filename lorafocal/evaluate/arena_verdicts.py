"""Arena-Hard's verdicts: the labels a judge ends on, the file that holds them, and the battles they count as."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.data.messages import read_text
from lorafocal.data.places import Place
from lorafocal.data.readers import objects, read_rows
from lorafocal.errors import InputError

GAMES = 2  # a question is judged twice: the baseline is assistant A in the first game, the model in the second
STRONG = 3  # battles that a strong verdict counts as
# The share of the win that assistant A gets, and in how many battles (arena-hard-auto v0.1, show_result.py).
LABELS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One question's labels by game; None where the judge gave none, or two that differ."""

    question_id: str
    labels: tuple[str | None, str | None]

    @property
    def wins(self) -> tuple[float | None, float | None]:
        """The share of the win that the model gets in each game: 0, 0.5 or 1; None without a known label."""
        first, second = (LABELS[label][0] if label in LABELS else None for label in self.labels)
        return (None if first is None else 1.0 - first), second

    @property
    def battles(self) -> list[float]:
        """The model's share of the win, a battle; a strong verdict is STRONG battles, none is none."""
        rounds = zip(self.labels, self.wins, strict=True)
        return [win for label, win in rounds if label is not None and win is not None for _ in range(LABELS[label][1])]


@dataclass(frozen=True, slots=True)
class Judged:
    """A file of judgments: one model against one baseline, by one judge (None where the file does not say)."""

    model: str
    judge: str | None
    verdicts: tuple[Verdicts, ...]


def label_in(text: str, pattern: re.Pattern[str]) -> tuple[str | None, bool]:
    """The one label in a judge's text, and whether it is worth asking on: only where there is no label at all.

    Two different labels are none: which one was meant is not guessed (arena-hard-auto v0.1, gen_judgment.py).
    """
    labels = sorted({match for match in pattern.findall(text) if match})
    return (labels[0].strip("\n") if len(labels) == 1 else None), not labels


def read_judgments(path: Path) -> Judged:
    """Arena-Hard's `model_judgment/<judge>/<model>.jsonl`: question_id, model, judge, games of a `score` each.

    Later releases of that project call the question `uid`; both are read. Raises InputError naming file and row for
    what is malformed, for a question that is judged twice, and for several models or judges in one file.
    """
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: judgments are a .jsonl file, which Arena-Hard writes for each model")
    found: dict[str, Verdicts] = {}
    models, judges = set(), set()
    for place, row in objects(read_rows(path), path.name, "a judgment"):
        verdicts = _verdicts(row, place)
        if verdicts.question_id in found:
            raise place.fault("twice", f"question {verdicts.question_id} is judged a second time; keep one of the two")
        found[verdicts.question_id] = verdicts
        models.add(read_text(row.get("model"), place.at("model")))
        judges.add(None if row.get("judge") is None else read_text(row["judge"], place.at("judge")))
    if not found:
        raise InputError(f"{path}: it holds no judgments")
    for key, names in (("model", models), ("judge", judges)):
        if len(names) > 1:
            raise InputError(
                f"{path}: `{key}` has several values ({', '.join(sorted(map(str, names)))}); split the file"
            )
    return Judged(models.pop(), judges.pop(), tuple(found.values()))


def _verdicts(row: Mapping[str, Any], place: Place) -> Verdicts:
    key = "uid" if "uid" in row else "question_id"
    games = row.get("games")
    if not isinstance(games, list) or len(games) != GAMES:
        raise place.at("games").fault("no_games", f"expected {GAMES} games, one for each order of the two answers")
    first, second = (_label(game, place.at(f"games[{number}].score")) for number, game in enumerate(games))
    return Verdicts(read_text(row.get(key), place.at(key)), (first, second))


def _label(game: Any, place: Place) -> str | None:
    if game is None:
        return None
    if not isinstance(game, Mapping) or "score" not in game:
        raise place.fault("no_score", "missing; a game has a label such as A>B, or null where the judge gave none")
    return None if game["score"] is None else read_text(game["score"], place)
