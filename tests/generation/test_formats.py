"""Files of answers: read back as they were written, and refused by row and key where they are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.generation.formats import AnswerRow, provenance_file, read_answers, write_answers

PROVENANCE: dict[str, Any] = {
    "target": {"name": "m"},
    "sampling": {"temperature": 0.9},
    "prompts": {"file": "p.json"},
    "versions": {},
    "counts": {"length_limit": 2},
}
ALPACA = [AnswerRow("\u00fc \u2028", "m", instruction="a"), AnswerRow("", "m", instruction="b", dataset="helpful")]
ARENA = [
    AnswerRow("two", "m", question_id="q1", turns=("one", "two"), tokens=(3, 4)),
    AnswerRow("x", "m", question_id="q2", turns=("x",), tokens=(None,)),
]


def test_both_forms_read_back(tmp_path: Path) -> None:
    for name, rows in (("a.json", ALPACA), ("b.jsonl", ARENA)):
        write_answers(tmp_path / name, rows, PROVENANCE)
        answers = read_answers(tmp_path / name)
        assert [(row.output, row.turns, row.question_id) for row in answers.rows] == [
            (row.output, row.turns, row.question_id) for row in rows
        ]
        assert answers.generator == "m"
        assert answers.file == name
        assert answers.sampling == PROVENANCE["sampling"]
        assert answers.target == PROVENANCE["target"]
        assert answers.counts == {"length_limit": 2}
    assert read_answers(tmp_path / "a.json").rows[1] == ALPACA[1]
    assert read_answers(tmp_path / "b.jsonl").rows[0].tokens == (3, 4)
    assert read_answers(tmp_path / "b.jsonl").rows[1].tokens == ()  # not known


def test_answers_of_others_have_no_provenance(tmp_path: Path) -> None:
    """AlpacaEval's published files have more keys; Arena-Hard's have random ids and times."""
    (tmp_path / "gpt.json").write_text(
        json.dumps([{"instruction": "a", "output": "b", "generator": "gpt", "dataset": "d", "datasplit": "eval"}])
    )
    theirs = {"question_id": "q", "answer_id": "x", "model_id": "gpt", "tstamp": 1.5,
              "choices": [{"index": 0, "turns": [{"content": "b", "token_len": 1}]}]}  # fmt: skip
    (tmp_path / "gpt.jsonl").write_text(json.dumps(theirs))
    for name in ("gpt.json", "gpt.jsonl"):
        answers = read_answers(tmp_path / name)
        assert answers.provenance is answers.sampling is answers.target is None
        assert answers.counts == {}
        assert (answers.generator, answers.rows[0].output) == ("gpt", "b")


@pytest.mark.row("58")
def test_a_provenance_is_of_these_very_answers(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_answers(file, ALPACA, PROVENANCE)
    file.write_text(file.read_text().replace("helpful", "other"))
    with pytest.raises(InputError, match=r"a\.provenance\.json describes another a\.json"):
        read_answers(file)
    provenance_file(file).write_text('{"format": 1, "target": {}}')
    with pytest.raises(InputError, match=r"no provenance of format 1 \(sampling, prompts, versions, counts, answers\)"):
        read_answers(file)
    provenance_file(file).write_text("no JSON")
    with pytest.raises(InputError, match="cannot be read as the provenance"):
        read_answers(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "it holds no answers"),
        ('["a"]', r"a\.json, row 1: an answer is an object, not a string"),
        ('[{"instruction": "a", "generator": "m"}]', r"row 1, key `output`: missing"),
        ('[{"instruction": "a", "output": 3, "generator": "m"}]', r"key `output`: expected a string, found a number"),
        ('[{"instruction": "a", "output": "b"}]', r"key `generator`: expected a string"),
        ('[{"question_id": "q", "model_id": "m", "choices": []}]', r"key `choices`: expected"),
        ('[{"question_id": "q", "model_id": "m", "choices": [{"turns": []}]}]', "no turn was answered"),
        ("{", "not valid JSON"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=says):
        read_answers(tmp_path / "a.json")


def test_two_answers_to_a_question_and_two_models_in_a_file_are_refused(tmp_path: Path) -> None:
    rows = [AnswerRow("x", model, question_id="q", turns=("x",), tokens=(1,)) for model in "mn"]
    write_answers(tmp_path / "a.jsonl", rows, PROVENANCE)
    with pytest.raises(InputError, match="question q has more than one answer"):
        read_answers(tmp_path / "a.jsonl")
    write_answers(tmp_path / "b.json", [AnswerRow("x", model, instruction="a") for model in "mn"], PROVENANCE)
    with pytest.raises(InputError, match=r"holds answers of 2 models \(m, n\)"):
        _ = read_answers(tmp_path / "b.json").generator
