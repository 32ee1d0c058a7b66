"""Numbers of pairs from rows and from a file of scores, joined by id and checked by digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorafocal.data.steps.flip import swapped
from lorafocal.data.steps.quantities import values_of
from lorafocal.errors import InputError
from tests.data.steps.made import made, shuffled, write_scores

PAIRS = made(6)
WHERE = "data.steps.2.select"


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "scores.jsonl", PAIRS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("margin", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ("reference_gap", [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]),
        ("ches", [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]),
        ("length_gap", [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_what_a_file_says(name: str, expected: list[float], scores: Path) -> None:
    assert values_of(PAIRS, name, scores, WHERE) == pytest.approx(expected)
    assert values_of(PAIRS[::-1], name, scores, WHERE) == pytest.approx(expected[::-1])


def test_what_rows_say() -> None:
    assert values_of(PAIRS[:3], "score_gap", None, WHERE) == [0.0, 7.0, 14.0]
    assert values_of(PAIRS[:3], "length_gap", None, WHERE) == [6 - 5, 6 - 10, 6 - 15]


@pytest.mark.parametrize(("name", "sign"), [("margin", -1), ("reference_gap", -1), ("length_gap", -1)])
def test_where_answers_were_exchanged_since_the_sign_is_too(name: str, sign: int, scores: Path) -> None:
    expected = [sign * value for value in values_of(PAIRS, name, scores, WHERE)]
    assert values_of([swapped(pair) for pair in PAIRS], name, scores, WHERE) == expected


def test_ches_has_no_sign_to_turn(scores: Path) -> None:
    with pytest.raises(InputError, match=r"data\.steps\.2\.select\.scores.*'id-0' with its answers exchanged"):
        values_of([swapped(pair) for pair in PAIRS], "ches", scores, WHERE)


@pytest.mark.row("31")
def test_other_texts_under_the_same_id_are_noticed(scores: Path) -> None:
    with pytest.raises(InputError, match="scored 'id-0' with other texts"):
        values_of([replace(PAIRS[0], chosen="another answer"), *PAIRS[1:]], "margin", scores, WHERE)


def test_without_digests_ids_are_trusted(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores.jsonl", shuffled(PAIRS), stamped=False)
    assert sorted(values_of(PAIRS, "margin", scores, WHERE)) == pytest.approx([n / 10 for n in range(6)])


@pytest.mark.parametrize("value", [None, "high", float("nan"), True])
def test_a_number_that_is_none_is_named_with_the_way_to_it(value: object, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores.jsonl", PAIRS, margin={"id-3": value})
    with pytest.raises(InputError, match="for margin of 'id-3', and margin is made of it; score with a reference"):
        values_of(PAIRS, "margin", scores, WHERE)


def test_two_scores_of_one_id_are_refused(scores: Path) -> None:
    scores.write_text(scores.read_text() + '{"id": "id-1", "margin": 5}\n')
    with pytest.raises(InputError, match="row 7 scores 'id-1' a second time"):
        values_of(PAIRS, "margin", scores, WHERE)


def test_a_row_without_a_score_is_named() -> None:
    with pytest.raises(
        InputError, match=r"score_gap needs both scores of every pair, and f, row 2 has no score_rejected"
    ):
        values_of([*PAIRS[:2], replace(PAIRS[2], score_rejected=None)], "score_gap", None, WHERE)
