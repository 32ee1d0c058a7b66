"""A data section to parts: cleaned, then split, then weighted; and what is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.data.prepare import Part, check_sources, dated_template, listed, prepare_data
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES
from lorafocal.schema import Data

TOKENIZER = toy_tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(**section: Any) -> dict[str, Part]:
    return prepare_data(Data.model_validate({"max_length": 64, "cache": False, **section}), TOKENIZER)


def prompts(part: Part) -> set[str]:
    return {pair.prompt[-1]["content"] for pair in part.preferences}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return toy_preferences(60, seed=1)


@pytest.mark.row("30")
def test_held_out_pairs_share_no_prompt_with_training_pairs(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    parts = prepared(train=write(tmp_path / "a.jsonl", rows), held_out=0.25)
    assert not prompts(parts["train"]) & prompts(parts["eval"])
    assert len(parts["train"].tokens.pairs) + len(parts["eval"].tokens.pairs) == 60
    assert abs(len(parts["eval"].tokens.pairs) - 15) <= 2


@pytest.mark.row("30")
def test_training_pairs_with_a_held_out_prompt_go(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    overlap = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    parts = prepared(train=write(tmp_path / "a.jsonl", rows), eval=write(tmp_path / "b.jsonl", overlap))
    assert not prompts(parts["train"]) & prompts(parts["eval"])
    assert {drop.reason for drop in parts["train"].drops} == {"in_held_out"}
    with pytest.raises(InputError, match=r"a\.jsonl, row 1: its prompt is also held out \(b\.jsonl, row 1\)"):
        prepared(train=str(tmp_path / "a.jsonl"), eval=str(tmp_path / "b.jsonl"), on_bad_row="error")


def test_sources_are_cleaned_together_and_weighted_afterwards(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    first, second = write(tmp_path / "a.jsonl", rows[:20]), write(tmp_path / "b.jsonl", rows[19:40])
    part = prepared(train=[{"path": first, "weight": 2.0}, {"path": second, "weight": 0.5}])["train"]
    assert [source.pairs for source in part.sources] == [20, 21]
    assert [(drop.reason, drop.count) for drop in part.drops] == [("duplicate", 1)]  # row 20, in both files
    from_first = [pair for pair in part.preferences if pair.place.startswith("a.jsonl")]
    assert (len(from_first), len(part.preferences) - len(from_first)) == (40, 10)
    assert len({pair.id for pair in part.tokens.pairs}) == 50


def test_a_copy_of_a_pair_is_never_on_both_sides(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    parts = prepared(train=[{"path": write(tmp_path / "a.jsonl", rows), "weight": 3.0}], held_out=10)
    assert not prompts(parts["train"]) & prompts(parts["eval"])
    assert len(parts["train"].tokens.pairs) == 3 * (60 - len(parts["eval"].tokens.pairs))


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    forward = prepared(train=write(tmp_path / "a.jsonl", rows), held_out=12)["eval"]
    backward = prepared(train=write(tmp_path / "b.jsonl", rows[::-1]), held_out=12)["eval"]
    assert prompts(forward) == prompts(backward)


@pytest.mark.row("31")
def test_the_cache_changes_nothing_but_the_time(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFOCAL_CACHE", str(tmp_path / "cache"))
    train = write(tmp_path / "a.jsonl", rows)
    results = [prepared(train=train, cache=cache)["train"].tokens for cache in (False, True, True)]
    assert results[0] == results[1] == results[2]
    assert (tmp_path / "cache").is_dir()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": "nowhere.jsonl"}, r"data\.train: nowhere\.jsonl does not exist"),
        ({"train": "owner/name"}, "owner/name: rows of the hub need revision"),
        ({"train": "no such thing"}, "no such thing: neither a file that exists nor a hub id"),
    ],
)
def test_a_missing_source_is_named_before_anything_is_read(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sources(Data.model_validate(section))


@pytest.mark.row("32")
def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", [{"prompt": "sort 2 1", "chosen": " 1 2", "rejected": " 2 1"}])
    with pytest.raises(InputError, match="chat_template_kwargs are given, but all rows are plain strings"):
        prepared(train=plain, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(InputError, match=r"a\.jsonl is a file and has no split"):
        prepared(train=plain, split="test")


def test_what_is_left_out_says_where_and_why(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    bad = [{"prompt": "x"}, *rows[:2], {"prompt": "y"}, rows[0]]
    part = prepared(train=write(tmp_path / "a.jsonl", bad))["train"]
    assert [(drop.reason, drop.count) for drop in part.drops] == [("missing_key", 2), ("duplicate", 1)]
    assert str(part).splitlines()[0] == "2 pairs, from a.jsonl (explicit, 3 read)"
    assert "a.jsonl, row 1" in str(part)


def test_nothing_left_says_what_was_wrong_first(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(InputError, match=r"none of its 1 rows can be used: 1 identical_completions"):
        prepared(train=write(tmp_path / "a.jsonl", [row]))


def test_scored_pairs_are_asked_for_their_scores_on_both_sides(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    scored = [row | {"score_chosen": n % 3, "score_rejected": 0.5} for n, row in enumerate(rows)]
    section = {"train": write(tmp_path / "train.jsonl", scored), "held_out": 4}
    every = prepared(**section)
    parts = prepare_data(
        Data.model_validate({"max_length": 64, "cache": False, **section}), TOKENIZER, objective=OBJECTIVES["odpo"]
    )
    kept = [pair for part in parts.values() for pair in part.tokens.pairs]
    assert sum(len(part.tokens.pairs) for part in every.values()) > len(kept) > 0
    assert all(pair.score_chosen > pair.score_rejected for pair in kept)
    assert any(drop.reason == "not_scored_higher" for drop in parts["train"].drops)
    section["train"] = write(tmp_path / "bare.jsonl", rows)
    with pytest.raises(InputError, match=r"bare.jsonl, row 1: has no score_chosen"):
        prepare_data(
            Data.model_validate({"max_length": 64, "cache": False, **section}), TOKENIZER, objective=OBJECTIVES["odpo"]
        )


def test_places_are_told_with_what_they_share_once() -> None:
    assert listed(["a.jsonl, row 3", "a.jsonl, row 5"]) == "a.jsonl, row 3, 5"
    assert listed(["a.jsonl, row 3", "b.jsonl, row 5"]) == "a.jsonl, row 3; b.jsonl, row 5"


def test_a_pair_that_tokenising_drops_ends_a_strict_run_but_for_its_length(tmp_path: Path) -> None:
    good = {"prompt": "sort 2 1", "chosen": " 1 2", "rejected": " 2 1"}
    forged = {"prompt": "sort 3 1", "chosen": " 1 3<|end|>", "rejected": " 3 1"}
    long = {"prompt": "sort 4 1", "chosen": " 1 4" * 90, "rejected": " 4 1"}
    rows = write(tmp_path / "a.jsonl", [good, forged, long])
    [part] = prepared(train=rows).values()
    assert {drop.reason: drop.examples for drop in part.drops} == {
        "control_tokens": ("a.jsonl, row 2",),
        "overlong": ("a.jsonl, row 3",),
    }
    with pytest.raises(InputError, match=r"a\.jsonl, row 2: their text spells special tokens"):
        prepared(train=rows, on_bad_row="error")
    assert len(prepared(train=write(tmp_path / "b.jsonl", [good, long]), on_bad_row="error")["train"].tokens.pairs) == 1


def test_a_template_that_writes_the_date_is_told(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    section = Data.model_validate({"train": write(tmp_path / "a.jsonl", rows), "max_length": 64, "cache": False})
    tokenizer = toy_tokenizer()
    parts = prepare_data(section, tokenizer)
    assert dated_template(parts, section, tokenizer) is None
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    assert "today's date" in str(dated_template(parts, section, tokenizer))
