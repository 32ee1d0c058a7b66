"""Whatever is cut: an answer on both sides, one prompt for both, no sequence too long, and every pair accounted for."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorafocal.data.tokens import TokenizedPair, tokenize_preferences
from lorafocal.data.truncation import TRUNCATIONS, Limits, check_limits, why_too_long
from lorafocal.errors import InputError
from tests.data.test_tokens import byte_tokenizer, pair

pytestmark = pytest.mark.slow

BOS = 0
IDS = st.lists(st.integers(1, 9), min_size=1, max_size=30)
PAIRS = st.builds(
    lambda bos, prompt, chosen, rejected: TokenizedPair("pair", [BOS] * bos + prompt, chosen, rejected, 2.0, 1.0),
    st.booleans(),
    IDS,
    IDS,
    IDS,
)
LENGTHS = st.integers(2, 40).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1)))


def limits_for(name: str, lengths: tuple[int, int]) -> Limits:
    return Limits(lengths[0], lengths[1] if name == "recipe" else None, BOS)


@pytest.mark.row("28")
@pytest.mark.parametrize("name", TRUNCATIONS)
@settings(max_examples=150)
@given(one=PAIRS, lengths=LENGTHS)
def test_what_a_rule_keeps_fits_and_is_part_of_what_was_given(
    name: str, one: TokenizedPair, lengths: tuple[int, int]
) -> None:
    kept = TRUNCATIONS[name](one, limits_for(name, lengths))
    if one.longest <= lengths[0]:
        assert kept is one
        return
    if kept is None:
        return
    assert kept.longest <= lengths[0]
    assert kept.chosen_ids
    assert kept.rejected_ids
    assert kept.prompt_ids
    assert kept.chosen_ids == one.chosen_ids[: len(kept.chosen_ids)]
    assert kept.rejected_ids == one.rejected_ids[: len(kept.rejected_ids)]
    assert set(kept.prompt_ids) <= set(one.prompt_ids)
    assert (kept.id, kept.score_chosen, kept.score_rejected) == ("pair", 2.0, 1.0)


@pytest.mark.row("28")
@settings(max_examples=200)
@given(one=PAIRS, lengths=LENGTHS)
def test_recipe_is_what_the_published_recipes_do(one: TokenizedPair, lengths: tuple[int, int]) -> None:
    """The oracle takes tokens away one at a time, as the description of TRL 0.9 to 0.11, SimPO and Lions reads."""
    max_length, max_prompt_length = lengths
    prompt, answers = list(one.prompt_ids), [list(one.chosen_ids), list(one.rejected_ids)]
    longer = max(len(answer) for answer in answers)
    if len(prompt) + longer > max_length:
        while len(prompt) > max_prompt_length:
            prompt.pop(0)
    if len(prompt) + longer > max_length:
        for answer in answers:
            while len(answer) > max_length - max_prompt_length:
                answer.pop()
    kept = TRUNCATIONS["recipe"](one, limits_for("recipe", lengths))
    assert kept is not None
    assert astuple(kept)[1:4] == (prompt, *answers)


@settings(max_examples=200)
@given(one=PAIRS, lengths=LENGTHS)
def test_keep_start_is_the_start_of_both_sequences(one: TokenizedPair, lengths: tuple[int, int]) -> None:
    kept = TRUNCATIONS["keep_start"](one, limits_for("keep_start", lengths))
    whole = [(one.prompt_ids + ids)[: lengths[0]] for ids in (one.chosen_ids, one.rejected_ids)]
    if len(one.prompt_ids) >= lengths[0]:
        assert kept is None
        assert why_too_long(one, "keep_start", lengths[0]) == "prompt_fills_length"
    else:
        assert kept is not None
        assert [kept.prompt_ids + ids for ids in (kept.chosen_ids, kept.rejected_ids)] == whole


@settings(max_examples=200)
@given(one=PAIRS, lengths=LENGTHS)
def test_cut_prompt_left_keeps_answers_whole_and_a_leading_bos(one: TokenizedPair, lengths: tuple[int, int]) -> None:
    assume(one.longest > lengths[0])
    kept = TRUNCATIONS["cut_prompt_left"](one, limits_for("cut_prompt_left", lengths))
    answer = max(len(one.chosen_ids), len(one.rejected_ids))
    if answer >= lengths[0]:
        assert kept is None
        assert why_too_long(one, "cut_prompt_left", lengths[0]) == "overlong"
        return
    assert kept is not None
    assert kept.longest == lengths[0]
    assert (kept.chosen_ids, kept.rejected_ids) == (one.chosen_ids, one.rejected_ids)
    tail = kept.prompt_ids
    if one.prompt_ids[0] == BOS:
        assert tail[0] == BOS
        tail = tail[1:]
    assert one.prompt_ids[len(one.prompt_ids) - len(tail) :] == tail


TEXTS = st.text(alphabet="ab ", min_size=1, max_size=12)


@pytest.mark.row("28", "30")
@pytest.mark.parametrize("name", TRUNCATIONS)
@settings(max_examples=60)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=6), lengths=LENGTHS)
def test_kept_and_dropped_add_up_and_no_pair_is_without_a_difference(
    name: str, rows: list[tuple[str, str, str]], lengths: tuple[int, int]
) -> None:
    tokenizer = byte_tokenizer()
    preferences = [pair(*row, name=str(place)) for place, row in enumerate(rows)] + [pair("a", "", "", name="none")]
    preferences.append(pair("a", "b", "a", name="short"))  # leaves one pair at least
    options: dict[str, Any] = {"max_length": max(lengths[0], 4), "truncation": name}
    options |= {"max_prompt_length": lengths[1]} if name == "recipe" else {}
    data = tokenize_preferences(preferences, tokenizer, **options)
    whole = {one.id: one for one in tokenize_preferences(preferences, tokenizer, max_length=1000).pairs}
    assert len(data.pairs) + sum(data.drops.values()) == len(preferences)
    assert data.cut == sum(kept != whole[kept.id] for kept in data.pairs)
    for kept in data.pairs:
        assert kept.chosen_ids
        assert kept.rejected_ids
        assert kept.chosen_ids != kept.rejected_ids
        assert kept.longest <= options["max_length"]


@pytest.mark.row("28", "30")
def test_answers_that_a_cut_makes_equal_are_dropped_and_said_so() -> None:
    rows = [pair("a", "same, yes", "same, no", "equal after the cut"), pair("a", "yes!", "no", "kept")]
    data = tokenize_preferences(rows, byte_tokenizer(), max_length=5, truncation="keep_start")
    assert data.drops == {"identical_completions": 1}
    assert [one.id for one in data.pairs] == ["kept"]
    assert data.cut == 1  # the pair that was dropped does not count


@pytest.mark.row("28")
def test_each_rule_on_one_pair() -> None:
    rows = [pair("abcdef", "ghij", "kl", "one")]
    tokenizer = byte_tokenizer()

    def texts(**options: object) -> tuple[str, ...]:
        [one] = tokenize_preferences(rows, tokenizer, **options).pairs
        return tuple(tokenizer.decode(ids) for ids in (one.prompt_ids, one.chosen_ids, one.rejected_ids))

    assert texts(max_length=12) == ("<s>abcdef", "ghij</s>", "kl</s>")
    assert texts(max_length=9, truncation="keep_start") == ("<s>abcdef", "gh", "kl")
    assert texts(max_length=9, truncation="cut_prompt_left") == ("<s>def", "ghij</s>", "kl</s>")
    assert texts(max_length=9, truncation="recipe", max_prompt_length=4) == ("cdef", "ghij</s>", "kl</s>")
    assert texts(max_length=7, truncation="recipe", max_prompt_length=4) == ("cdef", "ghi", "kl</s>")


@pytest.mark.parametrize("name", ["drop", "keep_start"])
def test_prompts_that_fill_the_length_have_their_own_reason(name: str) -> None:
    rows = [pair("a" * 9, "b", "c", "fills"), pair("a", "b", "c", "kept")]
    data = tokenize_preferences(rows, byte_tokenizer(), max_length=10, truncation=name)
    assert data.drops == {"prompt_fills_length": 1}


@pytest.mark.row("32")
def test_a_length_that_a_rule_would_not_look_at_is_refused() -> None:
    for name in set(TRUNCATIONS) - {"recipe"}:
        with pytest.raises(InputError, match=f"no effect with truncation: {name}"):
            check_limits(name, 10, 5)
    with pytest.raises(InputError, match="recipe needs max_prompt_length"):
        check_limits("recipe", 10, None)
    for wrong in (0, 10, 11):
        with pytest.raises(InputError, match=r"less than max_length \(10\)"):
            check_limits("recipe", 10, wrong)
    check_limits("recipe", 10, 9)
