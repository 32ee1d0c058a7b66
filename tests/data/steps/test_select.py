"""Selecting and ordering pairs: the right ones, whatever order the rows stand in."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafocal.data.steps.select import order, select
from lorafocal.errors import InputError
from lorafocal.schema.steps import Order, Select
from tests.data.steps.made import ids, made, shuffled, write_scores

PAIRS = made()
GAPS = {pair.id: pair.score_chosen for pair in PAIRS}


def selected(pairs=PAIRS, **settings):
    return select(pairs, Select(**{"by": "score_gap", "keep": 5} | settings), "data.steps.0.select")


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("highest", sorted(GAPS.values())[-5:]),
        ("lowest", sorted(GAPS.values())[:5]),
        ("middle", sorted(GAPS.values())[7:12]),
    ],
)
def test_the_pairs_with_those_values_are_kept_in_the_order_of_the_rows(which: str, expected: list[float]) -> None:
    kept = selected(which=which).pairs
    assert sorted(GAPS[pair.id] for pair in kept) == expected
    assert ids(kept) == [pair.id for pair in PAIRS if pair in kept]


@pytest.mark.parametrize("which", ["highest", "middle", "lowest"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_decides_nothing_even_among_ties(which: str, seed: int) -> None:
    settings = {"by": "length_gap", "keep": 0.4, "which": which}  # three lengths: nearly all are ties
    assert {*ids(selected(shuffled(PAIRS, seed), **settings).pairs)} == {*ids(selected(**settings).pairs)}


def test_selecting_again_what_was_selected_keeps_it() -> None:
    kept = selected(keep=5).pairs
    assert ids(selected([PAIRS[0], *kept], keep=5).pairs) == ids(kept)


def test_a_share_is_of_the_pairs() -> None:
    assert len(selected(keep=0.25).pairs) == 5


@pytest.mark.parametrize(("keep", "why"), [(20, "keeps them all"), (0.99, "keeps them all"), (0.01, "keeps none")])
def test_a_step_that_does_nothing_or_leaves_nothing_is_refused(keep: float, why: str) -> None:
    with pytest.raises(InputError, match=rf"data\.steps\.0\.select\.keep.*{why}"):
        selected(keep=keep)


def test_ches_keeps_the_lowest_unless_it_is_told(tmp_path: Path) -> None:
    scores = str(write_scores(tmp_path / "scores.jsonl", PAIRS))
    assert {*ids(selected(by="ches", scores=scores).pairs)} == {f"id-{n}" for n in range(15, 20)}
    assert {*ids(selected(by="ches", scores=scores, which="highest").pairs)} == {f"id-{n}" for n in range(5)}


def test_two_margins_keep_what_both_tell_apart(tmp_path: Path) -> None:
    """The pair that one source alone is sure of is not among the best."""
    margins = {pair.id: 1.9 for pair in PAIRS} | {"id-3": -1.9}  # id-3 has the gap 21, the second largest
    scores = str(write_scores(tmp_path / "scores.jsonl", PAIRS, margin=margins))
    bounds = {"score_gap": [-2.0, 25.0], "margin": [-2.0, 2.0]}
    kept = selected(by=["score_gap", "margin"], scores=scores, bounds=bounds, keep=3).pairs
    assert sorted(GAPS[pair.id] for pair in kept) == [19, 20, 22]


def test_pairs_without_scores_are_refused_or_left_out(tmp_path: Path) -> None:
    scores = str(write_scores(tmp_path / "scores.jsonl", PAIRS[:10]))
    with pytest.raises(InputError, match=r"no scores of 10 of 20 pairs, the first 'id-10' \(f, row 10\).*leave_out"):
        selected(by="margin", scores=scores)
    outcome = selected(by="margin", scores=scores, unscored="leave_out")
    assert {*ids(outcome.pairs)} == {f"id-{n}" for n in range(5, 10)}
    assert "10 without scores left out" in outcome.words


@pytest.mark.parametrize(("first", "expected"), [("highest", [22, 21, 20]), ("lowest", [0, 1, 3])])
def test_ordering(first: str, expected: list[float]) -> None:
    settings = Order(by="score_gap", first=first)
    ordered = order(PAIRS, settings, "data.steps.0.order").pairs
    assert [GAPS[pair.id] for pair in ordered[:3]] == expected
    assert {*ids(ordered)} == {*ids(PAIRS)}
    assert order(shuffled(PAIRS), settings, "data.steps.0.order").pairs == ordered
    assert order(ordered, settings, "data.steps.0.order").pairs == ordered
