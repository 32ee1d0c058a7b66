"""Weights and splits are exact, and depend on seed and ids only; no prompt is ever on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from lorafocal.data.mixture import join, split_held_out, weigh
from lorafocal.data.sources import BadRow, Preference, Preferences
from lorafocal.errors import InputError


def source(name: str, count: int, pairs_a_prompt: int = 1) -> Preferences:
    pairs = [
        Preference(f"{name} {n // pairs_a_prompt}", "good", f"bad {n}", f"{name}:{n}", place=f"{name}, row {n}")
        for n in range(count)
    ]
    return Preferences(pairs, [BadRow(f"{name}, row 99", "empty_prompt", "empty")], "explicit")


def ids(preferences: Preferences) -> list[str]:
    return [pair.id for pair in preferences.pairs]


def mixed(*sources: tuple[Preferences, float], seed: int = 0) -> list[str]:
    joined = join([preferences for preferences, _ in sources])
    return ids(weigh(joined.preferences, joined.source_of, [weight for _, weight in sources], seed=seed))


def test_sources_are_joined_in_order_with_ids_that_differ() -> None:
    one, two = source("a", 2), replace(source("a", 3), form="sharegpt, explicit")
    joined = join([one, two, source("b", 1)])
    assert ids(joined.preferences) == ["a:0", "a:1", "a:0~2", "a:1~2", "a:2", "b:0"]
    assert joined.source_of == {"a:0": 0, "a:1": 0, "a:0~2": 1, "a:1~2": 1, "a:2": 1, "b:0": 2}
    assert joined.preferences.form == "explicit, sharegpt"
    assert len(joined.preferences.bad_rows) == 3
    assert ids(join([one]).preferences) == ids(one)


def test_whole_weights_are_copies_and_fractions_a_sample() -> None:
    chosen = mixed((source("a", 10), 1), (source("b", 4), 2), (source("c", 100), 0.25), (source("d", 10), 1.5))
    counts = Counter(name.split(":")[0] for name in chosen)
    assert counts == {"a": 10, "b": 8, "c": 25, "d": 15}
    assert len(set(chosen)) == len(chosen)
    assert chosen[10:14] == ["b:0", "b:0#2", "b:1", "b:1#2"]
    assert mixed((source("a", 3), 0.01)) in (["a:0"], ["a:1"], ["a:2"])  # a source never vanishes


def test_copies_are_the_pair_under_another_id_that_nobody_has() -> None:
    own = source("a", 2)
    own = replace(own, pairs=[own.pairs[0], replace(own.pairs[1], id="a:0#2")])
    joined = join([own])
    weighed = weigh(joined.preferences, joined.source_of, [2], seed=0).pairs
    assert len({pair.id for pair in weighed}) == 4
    assert replace(weighed[1], id="a:0") == weighed[0]


def test_a_sample_depends_on_seed_and_ids_alone() -> None:
    a, b = source("a", 100), source("b", 100)
    alone = mixed((a, 0.3))
    beside = mixed((b, 0.7), (a, 0.3))
    backwards = mixed((replace(a, pairs=a.pairs[::-1]), 0.3))
    assert alone == [name for name in beside if name.startswith("a")] == backwards[::-1]
    assert mixed((a, 0.3), seed=1) != alone
    assert set(alone) < set(mixed((a, 0.6)))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 10**6, "2", True])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(InputError, match=r"the weight of source 2 is .*; give a number above 0"):
        mixed((source("a", 2), 1), (source("b", 2), weight))


@pytest.mark.row("30")
@pytest.mark.parametrize("pairs_a_prompt", [1, 3])
@pytest.mark.parametrize(("size", "pairs"), [(30, 30), (0.1, 30), (1, 1), (299, 299), (0.999, 299)])
def test_whole_prompts_are_held_out(pairs_a_prompt: int, size: float, pairs: int) -> None:
    everything = source("a", 300, pairs_a_prompt)
    if pairs_a_prompt == 3 and pairs == 1:
        with pytest.raises(
            InputError, match=r"held_out 1 of 300 pairs \(100 prompts, which stay whole\) leaves no held-"
        ):
            split_held_out(everything, size, seed=0)
        return
    train, held_out = split_held_out(everything, size, seed=0)
    assert len(held_out.pairs) == pairs - pairs % pairs_a_prompt
    assert not {pair.prompt for pair in train.pairs} & {pair.prompt for pair in held_out.pairs}
    assert sorted(ids(train) + ids(held_out)) == sorted(ids(everything))
    assert train.bad_rows == everything.bad_rows
    assert held_out.bad_rows == []


def test_a_size_is_reached_where_prompts_of_other_sizes_allow_it() -> None:
    joined = join([source("a", 40, 4), source("b", 10)]).preferences
    for seed in range(5):
        assert len(split_held_out(joined, 17, seed=seed)[1].pairs) == 17


def test_a_split_depends_on_seed_and_prompts_alone() -> None:
    everything = source("a", 100)
    _, held_out = split_held_out(everything, 20, seed=0)
    _, backwards = split_held_out(replace(everything, pairs=everything.pairs[::-1]), 20, seed=0)
    _, other = split_held_out(everything, 20, seed=1)
    assert ids(held_out) == ids(backwards)[::-1]
    assert ids(held_out) != ids(other)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "give 1 to 9"),
        (10, "give 1 to 9"),
        (1.0, "a share is between 0 and 1"),
        (0.0, "a share is between 0 and 1"),
        (float("nan"), "a share is between 0 and 1"),
        (True, "give a number of pairs"),
        ("5%", "give a number of pairs"),
    ],
)
def test_a_size_that_is_none_is_refused(size: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        split_held_out(source("a", 10), size, seed=0)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"leaves no held-out pairs; raise it, or name a file"):
        split_held_out(source("a", 10, 10), 5, seed=0)
