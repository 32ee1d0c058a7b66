"""Files of prompts: AlpacaEval's evaluation set, Arena-Hard's questions, preference rows, and plain lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.data.forms import Row, refuse_columns
from lorafocal.data.messages import kind, read_text
from lorafocal.data.places import Place
from lorafocal.data.readers import NumberedRow, objects, read_rows
from lorafocal.data.sources import Preference, Reading, collect
from lorafocal.errors import InputError, unreadable
from lorafocal.publish import sha256


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer, and what the user says after each answer.

    `place` says where it stands, for messages; `dataset` and `question_id` are the benchmark's own.
    """

    messages: tuple[Mapping[str, str], ...]
    place: str
    later: tuple[str, ...] = ()
    dataset: str | None = None
    question_id: str | None = None

    @property
    def instruction(self) -> str:
        """The prompt as one text: the question alone, or each message below its role in brackets."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file in order, the form that was recognised, the file's name and digest.

    `repeated` counts preference rows left out because an earlier one has the same prompt.
    """

    rows: tuple[Prompt, ...]
    form: str
    file: str
    sha256: str
    repeated: int = 0

    def as_dict(self) -> dict[str, Any]:
        """What the provenance of answers says of them."""
        return {"file": self.file, "sha256": self.sha256, "count": len(self.rows), "form": self.form}


def read_prompts(path: Path) -> Prompts:
    """Prompts of a file whose form its first row shows.

    These are AlpacaEval's evaluation set (`instruction`, `dataset`), Arena-Hard's questions (`question_id`, `turns`),
    preference rows of every form that training reads (each prompt once), rows with a `prompt` (a text, or messages),
    and .txt, a prompt a line. Raises InputError naming file, row and key for what is none of these, or is malformed.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        form, rows = "lines", _lines(path)
    else:
        numbered = list(read_rows(path))
        form = _form(numbered, path.name)
        rows = _preferences(numbered, path.name) if form == "preferences" else _each(numbered, path.name, form)
    if not rows:
        raise InputError(f"{path.name}: it holds no prompts; give one at least")
    kept = _once(rows) if form == "preferences" else rows
    return Prompts(tuple(kept), form, path.name, sha256(path), len(rows) - len(kept))


def _lines(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    return [
        Prompt(_asked(line), str(Place(path.name, number)))
        for number, line in enumerate((line.removesuffix("\r") for line in lines), start=1)
        if line.strip()
    ]


def _form(numbered: Sequence[NumberedRow], name: str) -> str:
    """What the first row is: one of `_READERS`, or "preferences". Raises InputError."""
    first = next((row for _, row in numbered if isinstance(row, Mapping)), None)
    if first is None:
        return "instructions"  # whose reader says what is wrong with the first row
    keys = {key for key, value in first.items() if value is not None}
    if "prompt_ids" in keys:
        raise InputError(f"{name} holds token ids: give the rows that they were made of, whose prompts are texts")
    if keys & {"chosen", "rejected", "preferred_output"}:
        return "preferences"
    for key, form in (("turns", "arena-hard"), ("instruction", "instructions"), ("prompt", "prompts")):
        if key in keys:
            return form
    found = ", ".join(sorted(map(str, keys))[:8]) or "nothing"
    raise InputError(
        f"{name}: no prompts are recognised (the first row has {found}); rows have an instruction (AlpacaEval), turns"
        " (Arena-Hard), a prompt, or are preference rows"
    )


def _each(numbered: Sequence[NumberedRow], name: str, form: str) -> list[Prompt]:
    prompts = []
    for place, values in objects(numbered, name, "a row"):
        row = Row(values, place)
        refuse_columns(row)
        prompts.append(_READERS[form](row))
    _check_ids(prompts, name)
    return prompts


def _instruction(row: Row) -> Prompt:
    """A row of AlpacaEval's evaluation set; its own `output` and `generator` are of the reference and are not read."""
    if row.values.get("input"):
        raise row.place.at("input").fault(
            "lost_input", "half of what was asked would be lost; join instruction and input in one text"
        )
    dataset = row.values.get("dataset")
    return Prompt(
        _asked(*row.texts("instruction")),
        str(row.place),
        dataset=None if dataset is None else read_text(dataset, row.place.at("dataset")),
    )


def _question(row: Row) -> Prompt:
    """A line of Arena-Hard's question.jsonl: its turns are objects with a `content`, or texts."""
    turns = row.values.get("turns")
    if not isinstance(turns, list) or not turns:
        raise row.place.at("turns").fault("wrong_type", f"expected a list of turns, found {kind(turns)}")
    texts = []
    for n, turn in enumerate(turns):
        content = turn.get("content") if isinstance(turn, Mapping) else turn
        texts += Row({"content": content}, row.place.at(f"turns[{n}].")).texts("content")
    return Prompt(_asked(texts[0]), str(row.place), later=tuple(texts[1:]), question_id=row.text("question_id"))


def _prompt(row: Row) -> Prompt:
    """A row with a prompt alone: a text, or messages."""
    if isinstance(row.values.get("prompt"), str):
        return Prompt(_asked(*row.texts("prompt")), str(row.place))
    return Prompt(tuple(row.prompt("prompt")), str(row.place))


_READERS: Mapping[str, Callable[[Row], Prompt]] = {
    "instructions": _instruction,
    "arena-hard": _question,
    "prompts": _prompt,
}


def _preferences(numbered: Sequence[NumberedRow], name: str) -> list[Prompt]:
    return [prompt_of(pair) for pair in collect(numbered, name, Reading.of(None, None, "error")).pairs]


def prompt_of(pair: Preference) -> Prompt:
    """What a pair's two answers answer."""
    return Prompt(_asked(pair.prompt) if isinstance(pair.prompt, str) else tuple(pair.prompt), pair.place)


def _asked(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of those with equal messages."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(json.dumps(prompt.messages, sort_keys=True), prompt)
    return list(first.values())


def _check_ids(prompts: Sequence[Prompt], name: str) -> None:
    ids = [prompt.question_id for prompt in prompts if prompt.question_id is not None]
    if len({*ids}) < len(ids):
        raise InputError(f"{name}: the question {next(q for q in ids if ids.count(q) > 1)} stands there twice")
