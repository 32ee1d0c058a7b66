"""Rows of several judged answers, and the pairs that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.data.ranked import pairing_of
from lorafocal.data.sources import Preference, preferences_from_rows, read_preferences
from lorafocal.errors import InputError
from lorafocal.schema.steps import Step

ROW = {"prompt": "2 + 2?", "answers": ["three", "four", "five", "cow"], "scores": [2.0, 5.0, 3.0, 1.0]}


def pairs(*rows: dict[str, Any], of: str = "best_worst", **how: Any) -> list[Preference]:
    pairing = pairing_of([Step(pairs={"of": of})])
    return preferences_from_rows(rows, "f", pairing=pairing, **how).pairs


def said(found: list[Preference]) -> list[tuple[Any, Any]]:
    return [(pair.chosen, pair.rejected) for pair in found]


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ("best_worst", [("four", "cow")]),
        ("best_each", [("four", "five"), ("four", "three"), ("four", "cow")]),
        ("adjacent", [("four", "five"), ("five", "three"), ("three", "cow")]),
        (
            "all",
            [
                ("four", "five"),
                ("four", "three"),
                ("four", "cow"),
                ("five", "three"),
                ("five", "cow"),
                ("three", "cow"),
            ],
        ),
        ("mu_minus_2_sigma", [("four", "cow")]),
    ],
)
def test_the_pairs_of_a_row(of: str, expected: list[tuple[str, str]]) -> None:
    found = pairs(ROW, of=of)
    assert said(found) == expected
    assert len({pair.id for pair in found}) == len(found)
    assert all(pair.score_chosen > pair.score_rejected for pair in found)  # type: ignore[operator]


def test_two_deviations_below_the_mean_is_not_the_worst_of_many() -> None:
    """Mean 9.24, deviation of the population 2.65: the target is 3.94, nearer to 5 than to 0."""
    row = {"prompt": "q", "responses": [f"a{n}" for n in range(17)], "scores": [10.0] * 14 + [12.0, 5.0, 0.0]}
    assert said(pairs(row, of="mu_minus_2_sigma")) == [("a14", "a15")]
    assert said(pairs(row)) == [("a14", "a16")]


def test_sets_are_a_pair_with_further_answers() -> None:
    (pair,) = pairs(ROW, of="sets")
    assert (pair.chosen, pair.rejected) == ("four", "cow")
    assert [(other.answer, other.score) for other in pair.others] == [("three", 2.0), ("five", 3.0)]


def test_raw_ultrafeedback_is_a_conversation() -> None:
    completions = [{"response": f"answer {n}", "overall_score": n, "model": "m"} for n in (3, 9, 6)]
    (pair,) = pairs({"instruction": "why?", "completions": completions})
    assert pair.prompt == [{"role": "user", "content": "why?"}]
    assert pair.chosen == [{"role": "assistant", "content": "answer 9"}]
    assert (pair.score_chosen, pair.score_rejected) == (9, 3)


def test_a_pair_that_was_made_already_gives_the_prompt() -> None:
    """As in llama3-ultrafeedback-armorm: conversations beside the texts of all answers."""
    ask = {"role": "user", "content": "why?"}
    tell = [{"role": "assistant", "content": text} for text in ("yes", "no", "perhaps")]
    row = {"prompt": "why?", "chosen": [ask, tell[0]], "rejected": [ask, tell[1]]}
    row |= {"all_generated_responses": ["yes", "no", "perhaps"], "all_rm_scores": [0.2, 0.1, 0.15]}
    found = pairs(row, of="adjacent")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == [
        ([ask], [tell[0]], [tell[2]]),
        ([ask], [tell[2]], [tell[1]]),
    ]


def test_ranks_in_place_of_scores() -> None:
    row = {"prompt": "q", "answers": ["x", "y", "z"], "ranking": [2, 3, 1]}
    (pair,) = pairs(row)
    assert (pair.chosen, pair.rejected, pair.score_chosen) == ("z", "y", None)
    nectar = {"prompt": "q", "answers": [{"answer": "x", "rank": 2.0}, {"answer": "y", "rank": 1.0}]}
    assert said(pairs(nectar)) == [("y", "x")]
    with pytest.raises(InputError, match="mu_minus_2_sigma needs a score of each answer"):
        pairs(row, of="mu_minus_2_sigma")


def test_columns_and_single_turn() -> None:
    row = {"ask": "q", "texts": ["x", "y"], "points": [1, 2]}
    columns = {"prompt": "ask", "answers": "texts", "scores": "points"}
    (pair,) = pairs(row, columns=columns, form="single_turn")
    assert pair.prompt == [{"role": "user", "content": "q"}]
    with pytest.raises(InputError, match="'explicit' is none of rows that pairs are made of"):
        pairs(row, columns=columns, form="explicit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": ["one"]}, "a pair needs two"),
        ({"answers": None}, "no list of answers"),
        ({"scores": [1.0, 2.0]}, "no list of 4"),
        ({"scores": None}, "neither score nor rank"),
        ({"scores": [1.0] * 4}, "no answer is judged better"),
        ({"scores": [1.0, 2.0, float("inf"), 3.0]}, "finite number"),
        ({"answers": ["three", "", "five", "cow"]}, "empty string"),
        ({"prompt": '[{"role": "user", "content": "2 + 2?"}]'}, "was written as text"),
        ({"prompt": None, "question": '[{"from": "human", "value": "2 + 2?"}]'}, "key `question`: .* written as text"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        pairs(ROW | change)


def test_without_the_step_the_error_names_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    with pytest.raises(
        InputError, match=r"several answers and no pair.*data\.steps: \[\{pairs: \{of: best_worst\}\}\]"
    ):
        read_preferences(file)
