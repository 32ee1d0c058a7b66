"""Answers of several models to the same prompts, and what an evaluation found of each, put side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafocal.errors import InputError
from lorafocal.evaluate.result import Result, prompt_sha256, read_result
from lorafocal.generation.formats import AnswerRow, Answers, read_answers
from lorafocal.generation.prompts import read_prompts

Key = tuple[str, int]  # a question's id or its text's digest, and which of several alike it is
NO_VERDICT = "no verdict"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one answer: `kind` is what a filter calls it, `text` what is shown."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Judgment:
    """One evaluation: its name, and which of the models it is about (None where its model is not shown)."""

    name: str
    model: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt with an answer a model and a verdict a judgment, None where there is none."""

    prompt: str
    group: str | None
    answers: tuple[str | None, ...]
    verdicts: tuple[Verdict | None, ...]

    @property
    def differs(self) -> bool:
        """Whether any two models answered differently."""
        return len(set(self.answers)) > 1


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Models, judgments, and one entry a prompt in the order of the files; `notes` say what was missing."""

    models: tuple[str, ...]
    judgments: tuple[Judgment, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


def side_by_side(answers: Sequence[Path], verdicts: Sequence[Path] = (), *, prompts: Path | None = None) -> SideBySide:
    """Match answers by their prompt, and results by their items.

    `verdicts` are results of `lorafocal evaluate`. Arena-Hard's answers hold no prompts: `prompts` is its file of
    questions, without which they are called by their id. Raises InputError for files that are none of these, for one
    with answers of several models, and where a result says nothing of these prompts.
    """
    if not answers:
        raise InputError("name at least one file of answers, as `lorafocal generate` writes it")
    files = [read_answers(Path(path)) for path in answers]
    results = [read_result(Path(path)) for path in verdicts]
    keyed = [dict(_numbered(file.rows, _key)) for file in files]
    models = _names(files)
    order = list(dict.fromkeys(key for rows in keyed for key in rows))
    texts = _questions(prompts, files)
    found = [_verdicts(result, path, order) for result, path in zip(results, verdicts, strict=True)]
    entries = tuple(
        _entry(key, [rows.get(key) for rows in keyed], [each.get(key) for each in found], texts) for key in order
    )
    judgments = tuple(Judgment(_title(result), _model(result, files)) for result in results)
    notes = (*_notes(models, keyed, judgments, found, order), *_unsure(judgments, results, files))
    return SideBySide(models, judgments, entries, notes)


def _key(row: AnswerRow) -> str:
    return row.question_id if row.instruction is None else prompt_sha256(row.instruction)  # type: ignore[return-value]


def _numbered(rows: Iterable[T], key: Callable[[T], str]) -> Iterator[tuple[Key, T]]:
    """Each row under its key and how many had the same before it: a prompt may stand in a file twice."""
    seen: Counter[str] = Counter()
    for row in rows:
        name = key(row)
        yield (name, seen[name]), row
        seen[name] += 1


def _names(files: Sequence[Answers]) -> tuple[str, ...]:
    """Each model's name, with its file's where two are called alike."""
    names = [file.generator for file in files]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({file.file})" for name, file in zip(names, files, strict=True)
    )


def _questions(path: Path | None, files: Sequence[Answers]) -> Mapping[str, str]:
    """The text of each question by its id. Raises InputError where no answer names its question by an id."""
    if path is not None and all(row.question_id is None for file in files for row in file.rows):
        raise InputError(f"{path}: these answers hold the texts of their prompts: leave --prompts out")
    rows = () if path is None else read_prompts(Path(path)).rows
    return {row.question_id: "\n\n".join((row.instruction, *row.later)) for row in rows if row.question_id is not None}


def _entry(
    key: Key, rows: Sequence[AnswerRow | None], verdicts: Sequence[Verdict | None], texts: Mapping[str, str]
) -> Entry:
    first = next(row for row in rows if row is not None)
    prompt = first.instruction if first.instruction is not None else texts.get(key[0], f"question {key[0]}")
    said = tuple(None if row is None else "\n\n".join(row.turns or (row.output,)) for row in rows)
    return Entry(prompt, first.dataset, said, tuple(verdicts))


def _verdicts(result: Result, path: Path, order: Sequence[Key]) -> dict[Key, Verdict]:
    """The verdict of each of the shown prompts that the result has an item for."""
    known = {name for name, _ in order}
    items = [item for item in result.items if _item_key(item, known) is not None]
    found = {key: _verdict(item) for key, item in _numbered(items, lambda item: _item_key(item, known) or "")}
    if not found:
        raise InputError(
            f"{path} says nothing of these prompts ({len(result.items)} items, none of them matches): give the result"
            " of an evaluation of one of these files"
        )
    return found


def _item_key(item: Mapping[str, Any], known: set[str]) -> str | None:
    names = (item.get("question_id"), item.get("prompt_sha256"))
    return next((name for name in names if isinstance(name, str) and name in known), None)


def _verdict(item: Mapping[str, Any]) -> Verdict:
    """What an item says: preferred or not, right or wrong, or a reward, alone or against another answer's."""
    preference, right, score, against = (item.get(key) for key in ("preference", "right", "score", "score_against"))
    if right is not None:
        return Verdict("right", "right") if right else Verdict("wrong", "wrong")
    if preference is not None:
        kind = _side(preference, 0.5)
        return Verdict(kind, f"{kind} ({preference:.2f})")
    if score is None:
        return Verdict(NO_VERDICT, NO_VERDICT)
    if against is None:
        return Verdict("scored", f"score {score:.3g}")
    kind = _side(score, against)
    return Verdict(kind, f"{kind} (score {score:.3g} against {against:.3g})")


def _side(value: float, other: float) -> str:
    return "preferred" if value > other else "tie" if value == other else "not preferred"


def _title(result: Result) -> str:
    judge = f" by {result.judge}" if result.judge else ""
    return f"{result.model}, {result.benchmark}{judge}"


def _model(result: Result, files: Sequence[Answers]) -> int | None:
    """The one model of that name; of several, the one whose file the result read."""
    named = [number for number, file in enumerate(files) if file.generator == result.model]
    read = [number for number in named if files[number].sha256 in result.inputs.values()]
    return next((found[0] for found in (read, named) if len(found) == 1), None)


def _notes(
    models: Sequence[str],
    keyed: Sequence[Mapping[Key, AnswerRow]],
    judgments: Sequence[Judgment],
    found: Sequence[Mapping[Key, Verdict]],
    order: Sequence[Key],
) -> Iterator[str]:
    for model, rows in zip(models, keyed, strict=True):
        if len(rows) < len(order):
            yield f"{model} has no answer to {len(order) - len(rows)} of {len(order)} prompts"
    for judgment, verdicts in zip(judgments, found, strict=True):
        judged = sum(key in verdicts for key in order)
        if judged < len(order):
            yield f"{judgment.name}: nothing is said of {len(order) - judged} of {len(order)} prompts"


def _unsure(judgments: Sequence[Judgment], results: Sequence[Result], files: Sequence[Answers]) -> Iterator[str]:
    """A model may have answered twice under one name: a verdict belongs to what is shown where its file was read."""
    for judgment, result in zip(judgments, results, strict=True):
        if judgment.model is not None and files[judgment.model].sha256 not in result.inputs.values():
            file = files[judgment.model].file
            yield f"{judgment.name}: it does not say that it read {file}, so it may be of other answers of that name"
