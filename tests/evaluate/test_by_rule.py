"""Answers judged by a rule: targets matched by prompt, verdicts in order, nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.data.toy import is_right, right_answer, toy_preferences, toy_prompts
from lorafocal.errors import InputError
from lorafocal.evaluate.by_rule import evaluate_rule, read_targets
from lorafocal.evaluate.intervals import share
from lorafocal.evaluate.result import prompt_sha256
from lorafocal.generation.formats import AnswerRow, write_answers

QUESTIONS = ("what is 6 x 7?", "what is 3 - 5?", "what is 1 / 2?")
PROVENANCE: dict[str, Any] = {
    "target": {"name": "mine"},
    "sampling": {"temperature": 0.9},
    "prompts": {"file": "p.jsonl"},
    "versions": {},
    "counts": {"length_limit": 1},
}


def answered(folder: Path, texts: tuple[str, ...], questions: tuple[str, ...] = QUESTIONS) -> Path:
    rows = [AnswerRow(text, "mine", question) for question, text in zip(questions, texts, strict=True)]
    write_answers(folder / "mine.json", rows, PROVENANCE)
    return folder / "mine.json"


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "targets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.row("58")
def test_answers_are_matched_with_their_targets_by_prompt(tmp_path: Path) -> None:
    answers = answered(tmp_path, ("It is 42.", "It is 2.", "0.50"))
    rows = [{"prompt": QUESTIONS[n], "target": target} for n, target in ((2, 0.5), (0, 42), (1, "#### -2"))]
    targets = rows_file(tmp_path, [*rows, {"prompt": "another one", "target": 7}])
    found = evaluate_rule(answers, rule="number", targets=targets)
    assert [item["right"] for item in found.items] == [True, False, True]
    assert [item["prompt_sha256"] for item in found.items] == [prompt_sha256(question) for question in QUESTIONS]
    assert found.scores["right"] == share([True, False, True]).percent
    assert (found.model, found.sampling, found.target) == ("mine", {"temperature": 0.9}, {"name": "mine"})
    assert found.settings == {"rule": "number", "pattern": None, "keys": [], "field": "target"}
    assert set(found.inputs) == {"mine.json", "targets.jsonl"}
    assert found.notes == ("1 of 3 answers were cut at the limit of new tokens",)


def test_the_chosen_answers_of_preference_rows_are_targets(tmp_path: Path) -> None:
    """The quickstart's questions: the exact rule on the chosen answers says what the task's own rule says."""
    rows = toy_preferences(6, seed=2, held_out=True)
    questions = tuple(prompt[-1]["content"] for prompt in toy_prompts(6, seed=2, held_out=True))
    texts = tuple(right_answer(question) if n % 2 else "9 9" for n, question in enumerate(questions))
    answers = answered(tmp_path, texts, questions)
    found = evaluate_rule(answers, rule="exact", targets=rows_file(tmp_path, rows), field="chosen")
    own = evaluate_rule(answers, rule=is_right)
    assert [item["right"] for item in found.items] == [False, True] * 3
    assert found.items == own.items
    assert own.settings["rule"] == "is_right"


def test_conversations_are_named_as_generate_names_them(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": messages, "chosen": [{"role": "assistant", "content": "2"}]}]
    rows[0]["rejected"] = [{"role": "assistant", "content": "3"}]
    assert read_targets(rows_file(tmp_path, rows), "chosen") == {"[system]\nBe brief.\n\n[user]\n1 + 1?": "2"}


def test_rules_without_a_target(tmp_path: Path) -> None:
    answers = answered(tmp_path, ('{"a": 1}', "[1]", "no"))
    assert [item["right"] for item in evaluate_rule(answers, rule="json").items] == [True, True, False]
    assert [item["right"] for item in evaluate_rule(answers, rule="json", keys=("a",)).items] == [True, False, False]
    found = evaluate_rule(answers, rule="regex", pattern="^n")
    assert [item["right"] for item in found.items] == [False, False, True]


def test_answers_of_others_say_that_nothing_is_known_of_them(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "{}", "generator": "theirs"}]))
    found = evaluate_rule(path, rule="json")
    assert found.sampling is None
    assert "no provenance" in found.notes[0]


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    answers = answered(tmp_path, ("a", "b", "c"))
    full = [{"prompt": question, "target": "1"} for question in QUESTIONS]
    for rows, message in (
        (full[:2], r"targets\.jsonl: target: 1 of 3 answers have no target there, the first being answer 3"),
        ([*full, full[0] | {"target": "2"}], r"row 4.*another target for this prompt"),
        ([full[0] | {"target": None}], r"row 1.*target is missing.*--field"),
        ([full[0] | {"target": [1]}], "a text or number"),
        ([row | {"target": "one"} for row in full], r"targets\.jsonl: target: the target 'one' holds no number"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_rule(answers, rule="number", targets=rows_file(tmp_path, rows))
    targets = rows_file(tmp_path, full)
    with pytest.raises(InputError, match="--targets"):
        evaluate_rule(answers, rule="exact")
    with pytest.raises(InputError, match="reads no targets"):
        evaluate_rule(answers, rule="json", targets=targets)
    with pytest.raises(InputError, match="a function reads none"):
        evaluate_rule(answers, rule=is_right, targets=targets)
    repeated = toy_preferences(2, seed=2) * 2
    with pytest.raises(InputError, match="2 rows repeat a prompt"):
        read_targets(rows_file(tmp_path, [row | {"target": "1"} for row in repeated]))


def test_answers_without_their_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    turns = [{"content": "x", "token_len": 1}]
    path.write_text(json.dumps({"question_id": "q", "model_id": "m", "choices": [{"turns": turns}]}) + "\n")
    with pytest.raises(InputError, match="no texts of its prompts"):
        evaluate_rule(path, rule="json")
