"""The rule agrees with the answers it judges, the split holds, and everything is a function of its seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorafocal.data.sources import preferences_from_rows
from lorafocal.data.tokens import tokenize_preferences
from lorafocal.data.toy import (
    OPERATIONS,
    is_held_out,
    is_right,
    noisy_answers,
    right_answer,
    toy_preferences,
    toy_prompts,
    toy_tokenizer,
    wrong_answer,
)
from lorafocal.errors import InputError


def questions(count: int, seed: int, *, held_out: bool = False) -> list[str]:
    return [prompt[-1]["content"] for prompt in toy_prompts(count, seed=seed, held_out=held_out)]


def test_the_right_answers_are_right() -> None:
    assert right_answer("sort 3 1 4") == "1 3 4"
    assert right_answer("reverse 3 1 4 4") == "4 4 1 3"
    assert right_answer("maximum 3 1 4 1 2") == "4"


@pytest.mark.parametrize("question", ["", "sort", "add 1 2", "sort 1 x", "sort 12 3"])
def test_another_question_is_refused(question: str) -> None:
    with pytest.raises(InputError, match="no question of the toy task"):
        right_answer(question)


def test_the_rule_tells_right_from_wrong_for_every_question() -> None:
    rng = random.Random(0)
    asked = questions(2000, seed=5)
    assert {question.split()[0] for question in asked} == set(OPERATIONS)
    assert {len(question.split()) for question in asked} == {4, 5, 6}
    for question in [*asked, "sort 4 4 4", "maximum 0 0 0"]:
        wrong = wrong_answer(question, rng)
        assert is_right(question, right_answer(question))
        assert not is_right(question, wrong)
        assert len(wrong) == len(right_answer(question))


def test_the_rule_reads_conversations_and_ignores_spaces() -> None:
    assert is_right([{"role": "user", "content": "sort 3 1 4"}], " 134 ")
    assert not is_right("sort 3 1 4", "1 3 4 4")
    assert not is_right("sort 3 1 4", "")


def test_prompts_are_distinct_and_the_same_for_the_same_seed() -> None:
    assert len(set(questions(3000, seed=1))) == 3000
    assert questions(50, seed=1) == questions(80, seed=1)[:50]
    assert questions(50, seed=1) != questions(50, seed=2)


def test_held_out_prompts_never_meet_training_ones() -> None:
    held_out, training = questions(2000, seed=1, held_out=True), questions(5000, seed=1)
    noisy = [question for question, _ in noisy_answers(5000, wrong_share=0.5, seed=3)]
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, [*training, *noisy]))


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="1 to 20000 distinct prompts, not 20001"):
        toy_prompts(20_001)


def test_preferences_are_rows_of_the_usual_form() -> None:
    """They are read and tokenised like anybody's data; chosen is right and rejected is wrong."""
    rows = toy_preferences(200, seed=4)
    assert rows == toy_preferences(200, seed=4)
    for row in rows:
        assert is_right(row["prompt"], row["chosen"][0]["content"])
        assert not is_right(row["prompt"], row["rejected"][0]["content"])
    data = tokenize_preferences(preferences_from_rows(rows, "toy").pairs, toy_tokenizer(), max_length=32)
    assert len(data.pairs) == 200
    assert data.seam_merges == 0


@pytest.mark.parametrize("wrong_share", [0.0, 0.45, 1.0])
def test_the_wrong_share_is_what_was_asked_for(wrong_share: float) -> None:
    answers = list(noisy_answers(4000, wrong_share=wrong_share, seed=0))
    wrong = sum(not is_right(question, answer) for question, answer in answers) / len(answers)
    assert wrong == pytest.approx(wrong_share, abs=0.03 if 0 < wrong_share < 1 else 0)


def test_the_tokenizer_survives_saving_and_loads_by_the_usual_door(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    row = toy_preferences(1, seed=0)[0]
    messages = row["prompt"] + row["chosen"]
    assert loaded.apply_chat_template(messages)["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert (loaded.eos_token, loaded.bos_token) == ("<|end|>", None)
    ids = tokenizer("reverse 3 1 4")["input_ids"]
    assert tokenizer.decode(ids) == "reverse 3 1 4"
    assert tokenizer.unk_token_id not in ids
