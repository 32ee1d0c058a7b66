"""Answers as files: AlpacaEval's `model_outputs` list or Arena-Hard's answer lines, and their provenance beside them.

`write_answers` writes the same bytes for the same answers. `read_answers` reads both forms, also those that others
wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.data.messages import read_text
from lorafocal.data.places import Place
from lorafocal.data.readers import objects, read_rows
from lorafocal.errors import InputError
from lorafocal.publish import sha256, text_sha256, write_atomically

FORMAT = 1  # of the provenance file
ALPACA, ARENA = "alpaca", "arena"
SUFFIXES = {".json": ALPACA, ".jsonl": ARENA}


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One answer: its text, the model's name, and what it answers.

    AlpacaEval's form names that by the text `instruction`; Arena-Hard's by `question_id`, and has one answer in `turns`
    for each of the question's turns, of which `output` is the last. `tokens` counts them, where the file says so.
    """

    output: str
    generator: str
    instruction: str | None = None
    dataset: str | None = None
    question_id: str | None = None
    turns: tuple[str, ...] = ()
    tokens: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Answers:
    """A file of answers: its rows in order, what `generate` said of it (None where nobody did), name and digest."""

    rows: tuple[AnswerRow, ...]
    provenance: Mapping[str, Any] | None
    file: str
    sha256: str

    @property
    def generator(self) -> str:
        """The one model that answered. Raises InputError where there are several."""
        names = sorted({row.generator for row in self.rows})
        if len(names) > 1:
            raise InputError(
                f"{self.file} holds answers of {len(names)} models ({', '.join(names[:3])}): give one each"
            )
        return names[0]

    @property
    def sampling(self) -> Mapping[str, Any] | None:
        """How they were drawn, where that is known."""
        return None if self.provenance is None else self.provenance["sampling"]

    @property
    def target(self) -> Mapping[str, Any] | None:
        """What answered, where that is known."""
        return None if self.provenance is None else self.provenance["target"]

    @property
    def counts(self) -> Mapping[str, int]:
        """What was counted on the way, such as `length_limit`: answers that were cut."""
        return {} if self.provenance is None else self.provenance["counts"]


def provenance_file(path: Path) -> Path:
    """Where the provenance of the answers in `path` lies."""
    return path.with_name(f"{path.stem}.provenance.json")


def form_of(path: Path) -> str:
    """The form of answers that a file's name asks for. Raises InputError."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: answers end in .json (AlpacaEval's form) or .jsonl (Arena-Hard's form)")
    return SUFFIXES[path.suffix]


def write_answers(path: Path, rows: Sequence[AnswerRow], provenance: Mapping[str, Any]) -> None:
    """The answers, then their provenance with the digest of their file; each complete or absent."""
    text = _alpaca(rows) if form_of(path) == ALPACA else "".join(map(_arena, rows))
    write_atomically(path, text)
    record = {"format": FORMAT, **provenance, "answers": {"file": path.name, "sha256": text_sha256(text)}}
    write_atomically(provenance_file(path), json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _alpaca(rows: Sequence[AnswerRow]) -> str:
    records = [
        {"instruction": row.instruction, "output": row.output, "generator": row.generator}
        | ({} if row.dataset is None else {"dataset": row.dataset})
        for row in rows
    ]
    return json.dumps(records, indent=1, ensure_ascii=False) + "\n"


def _arena(row: AnswerRow) -> str:
    """One line. Its `answer_id`, a random one there, is the digest of the answer; `token_len` is of the model's own
    tokens; and there is no `tstamp`, as nothing reads it and the bytes would differ from run to run."""
    turns = [{"content": text, "token_len": tokens} for text, tokens in zip(row.turns, row.tokens, strict=True)]
    identity = json.dumps([row.question_id, row.generator, row.turns], ensure_ascii=False)
    record = {
        "question_id": row.question_id,
        "answer_id": text_sha256(identity)[:22],
        "model_id": row.generator,
        "choices": [{"index": 0, "turns": turns}],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


# ---- reading


def read_answers(path: Path) -> Answers:
    """Answers of either form, with the provenance beside them.

    Raises InputError naming file, row and key for what is missing or malformed, for two answers to one question, and
    where the provenance beside it is of another file.
    """
    path = Path(path)
    rows = [_read_row(values, place) for place, values in objects(read_rows(path), path.name, "an answer")]
    if not rows:
        raise InputError(f"{path}: it holds no answers")
    asked = [row.question_id for row in rows if row.question_id is not None]
    if len({*asked}) < len(asked):
        twice = next(question for question in asked if asked.count(question) > 1)
        raise InputError(f"{path}: question {twice} has more than one answer; keep one")
    return Answers(tuple(rows), _read_provenance(path), path.name, sha256(path))


def _read_row(values: Mapping[str, Any], place: Place) -> AnswerRow:
    if "choices" in values:
        return _read_arena(values, place)
    for key in ("instruction", "output"):
        if values.get(key) is None:
            raise place.at(key).fault(
                "missing_key",
                "missing; an answer has instruction, output and generator (AlpacaEval's form), or question_id, model_id"
                " and choices (Arena-Hard's)",
            )
    dataset = values.get("dataset")
    return AnswerRow(
        output=read_text(values["output"], place.at("output")),
        generator=read_text(values.get("generator"), place.at("generator")),
        instruction=read_text(values["instruction"], place.at("instruction")),
        dataset=None if dataset is None else read_text(dataset, place.at("dataset")),
    )


def _read_arena(values: Mapping[str, Any], place: Place) -> AnswerRow:
    try:
        turns = values["choices"][0]["turns"]
        texts = tuple(read_text(turn["content"], place.at("choices[0].turns.content")) for turn in turns)
        lengths = tuple(turn.get("token_len") for turn in turns)
    except (LookupError, TypeError, AttributeError) as error:
        raise place.at("choices").fault("no_choices", 'expected [{"turns": [{"content": text}]}]') from error
    if not texts:
        raise place.at("choices").fault("no_choices", "no turn was answered; generate this answer again")
    return AnswerRow(
        output=texts[-1],
        generator=read_text(values.get("model_id"), place.at("model_id")),
        question_id=read_text(values.get("question_id"), place.at("question_id")),
        turns=texts,
        tokens=lengths if all(type(length) is int for length in lengths) else (),
    )


def _read_provenance(path: Path) -> dict[str, Any] | None:
    file = provenance_file(path)
    if not file.is_file():
        return None
    record = read_provenance(file)
    if record["answers"].get("sha256") != sha256(path):
        raise InputError(
            f"{file} describes another {path.name} (its sha256 differs): restore that one, or remove {file.name}"
        )
    return record


def read_provenance(file: Path) -> dict[str, Any]:
    """What `write_answers` left beside its answers. Raises InputError naming the key where it is something else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as the provenance of answers ({error}): remove it") from error
    keys = ("target", "sampling", "prompts", "versions", "counts", "answers")
    wrong = [key for key in keys if not isinstance(record, dict) or not isinstance(record.get(key), dict)]
    if wrong or record.get("format") != FORMAT:
        raise InputError(
            f"{file}: no provenance of format {FORMAT} ({', '.join(wrong) or 'format'}): remove it, or use the version"
            " that wrote it"
        )
    return record
