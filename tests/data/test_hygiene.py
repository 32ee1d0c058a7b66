"""Planted duplicates, contradictions, equal answers and overlaps are counted exactly; nothing else goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from lorafocal.data.hygiene import (
    ScoreOrder,
    clean,
    drop_contradictions,
    drop_duplicates,
    drop_equal_answers,
    drop_overlap,
    drop_unranked,
    score_order,
)
from lorafocal.data.sources import Preference, Preferences
from lorafocal.errors import InputError


def pair(prompt: str, chosen: str, rejected: str, row: int, *, chat: bool = False, **scores: float) -> Preference:
    sides: list[Any] = [prompt, chosen, rejected]
    if chat:
        roles = ("user", "assistant", "assistant")
        sides = [[{"role": role, "content": text}] for role, text in zip(roles, sides, strict=True)]
    return Preference(*sides, f"p{row}", place=f"pairs.jsonl, row {row}", **scores)


def preferences(*pairs: Preference) -> Preferences:
    return Preferences([*pairs], [], "explicit")


PLANTED = preferences(
    pair("a", "good", "bad", 1),
    pair("a", "good", "bad", 2),  # a duplicate
    pair("a", "good", "worse", 3),  # the same prompt with another answer is none
    pair("b", "good", "bad", 4),  # contradicted by row 6
    pair("c", "same", "same ", 5),  # equal but for a blank
    pair("b", "bad", "good", 6),
    pair("b", "good", "bad", 7),  # a duplicate of a contradiction
    pair("a", "good", "bad ", 8, chat=True),  # a duplicate in another form
    pair("d", "bad", "good", 9),  # the same answers swapped under another prompt
)


@pytest.mark.row("30")
def test_planted_cases_are_counted_exactly() -> None:
    cleaned = clean(PLANTED)
    assert [kept.id for kept in cleaned.pairs] == ["p1", "p3", "p9"]
    rows = [(row.reason, row.place.rpartition(" ")[2]) for row in cleaned.bad_rows]
    assert rows == [
        ("identical_completions", "5"),
        ("duplicate", "2"),
        ("duplicate", "7"),
        ("duplicate", "8"),
        ("contradiction", "4"),
        ("contradiction", "6"),
    ]
    assert clean(cleaned) == cleaned
    assert len(PLANTED.pairs) == 9  # the input is left as it was


@pytest.mark.row("30")
def test_a_pair_that_was_told_before_names_the_first() -> None:
    cleaned = drop_duplicates(PLANTED)
    assert Counter(row.reason for row in cleaned.bad_rows) == {"duplicate": 3}
    assert str(cleaned.bad_rows[0]).startswith("pairs.jsonl, row 2: the same pair as pairs.jsonl, row 1; remove one")


@pytest.mark.row("30")
def test_both_sides_of_a_contradiction_go() -> None:
    cleaned = drop_contradictions(PLANTED)
    assert [row.place for row in cleaned.bad_rows] == [f"pairs.jsonl, row {row}" for row in (4, 6, 7)]
    assert "judged the other way round in pairs.jsonl, row 6; remove the wrong one" in cleaned.bad_rows[0].message


@pytest.mark.row("30")
def test_equal_answers_go() -> None:
    cleaned = drop_equal_answers(PLANTED)
    assert [row.place for row in cleaned.bad_rows] == ["pairs.jsonl, row 5"]


@pytest.mark.row("30")
def test_training_pairs_with_a_held_out_prompt_go() -> None:
    held_out = preferences(pair("b", "x", "y", 1), pair("d ", "x", "y", 2, chat=True))
    apart = drop_overlap(PLANTED, held_out)
    assert [(row.reason, row.place) for row in apart.bad_rows] == [
        ("in_held_out", f"pairs.jsonl, row {row}") for row in (4, 6, 7, 9)
    ]
    assert "its prompt is also held out (pairs.jsonl, row 1)" in apart.bad_rows[0].message
    assert [kept.id for kept in apart.pairs] == ["p1", "p2", "p3", "p5", "p8"]


@pytest.mark.row("30")
def test_a_prompt_is_its_whole_conversation() -> None:
    """The same last question after another start is another prompt."""
    question = {"role": "user", "content": "Why?"}
    starts = [[{"role": role, "content": "Hi."}, question] for role in ("system", "user")]
    one, two = (Preference(start, "good", "bad", f"p{n}") for n, start in enumerate(starts))
    assert drop_overlap(preferences(one), preferences(two)).pairs == [one]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (drop_equal_answers, "pairs.jsonl, row 5: chosen and rejected are equal"),
        (drop_duplicates, "pairs.jsonl, row 2: the same pair as"),
        (drop_contradictions, "pairs.jsonl, row 4: judged the other way round"),
        (
            lambda all_of, on_bad_row: drop_overlap(all_of, all_of, on_bad_row=on_bad_row),
            "row 1: its prompt is also held",
        ),
    ],
)
def test_under_error_the_first_one_ends_it(rule: Callable[..., Preferences], says: str) -> None:
    with pytest.raises(InputError) as error:
        rule(PLANTED, on_bad_row="error")
    assert says in str(error.value)


def test_where_nothing_is_left_the_reasons_are_given() -> None:
    both = preferences(pair("a", "good", "bad", 1), pair("a", "bad", "good", 2))
    with pytest.raises(
        InputError, match=r"none of its 2 rows can be used: 2 contradiction, such as pairs.jsonl, row 1"
    ):
        clean(both)


def scored(*scores: tuple[float | None, float | None]) -> Preferences:
    rows = (pair("a", f"good {n}", "bad", n, score_chosen=c, score_rejected=r) for n, (c, r) in enumerate(scores, 1))
    return preferences(*rows)


@pytest.mark.row("30")
def test_an_objective_of_the_score_gap_gets_pairs_that_have_one() -> None:
    kept = drop_unranked(scored((1.0, 0.0), (0.5, 0.5), (0.1, 0.9), (0.2, -0.1)))
    assert [one.score_chosen for one in kept.pairs] == [1.0, 0.2]
    assert [row.reason for row in kept.bad_rows] == ["not_scored_higher"] * 2
    assert "scores chosen 0.5 and rejected 0.5" in kept.bad_rows[0].message
    with pytest.raises(InputError, match=r"pairs.jsonl, row 2: scores chosen 0.5"):
        drop_unranked(scored((1.0, 0.0), (0.5, 0.5)), on_bad_row="error")


@pytest.mark.parametrize(
    ("scores", "key"),
    [((1.0, None), "score_rejected"), ((None, 1.0), "score_chosen"), ((None, None), "score_chosen")],
)
def test_a_missing_score_is_refused_whatever_becomes_of_bad_rows(scores: tuple[Any, Any], key: str) -> None:
    for on_bad_row in ("drop", "error"):
        with pytest.raises(InputError, match=rf"pairs.jsonl, row 2: has no {key}, .* give every row both"):
            drop_unranked(scored((1.0, 0.0), scores), on_bad_row=on_bad_row)  # type: ignore[arg-type]


@pytest.mark.row("30")
def test_ties_and_inversions_of_scores_are_counted_and_kept() -> None:
    scores = [(1.0, 0.0), (0.5, 0.5), (0.1, 0.9), (0.2, 0.9)]
    pairs = [pair("a", "b", "c", n, score_chosen=c, score_rejected=r) for n, (c, r) in enumerate(scores)]
    assert score_order([*pairs, pair("a", "b", "c", 9, score_chosen=1.0)]) == ScoreOrder(scored=4, ties=1, inversions=2)
    assert score_order([]) == ScoreOrder(0, 0, 0)
