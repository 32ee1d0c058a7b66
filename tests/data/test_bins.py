"""Bins of a budget: nothing lost, few of them, and level where that costs none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafocal.data.bins import fill_bins


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_bins_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = fill_bins(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1


def fewest(lengths: list[int], budget: int) -> int:
    """Bins that are needed, by trying every placement."""

    @cache
    def best(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        item, *others = left
        options = [
            best(tuple(others), tuple(sorted((*rooms[:i], room - item, *rooms[i + 1 :]))))
            for i, room in enumerate(rooms)
            if room >= item
        ]
        return min([*options, best(tuple(others), tuple(sorted((*rooms, max(0, budget - item)))))])

    return best(tuple(lengths), ())


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=7), st.integers(30, 100))
def test_bins_are_few(lengths: list[int], budget: int) -> None:
    """The bound of best fit, longest first (Johnson 1974; Dosa 2007): 11/9 of the fewest and 6/9."""
    assert len(fill_bins(lengths, budget)) <= (11 * fewest(lengths, budget) + 6) // 9


def lognormal(count: int, mean: float) -> list[int]:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.5).exp() * mean
    return [int(value) for value in values.long().clamp(20, 2000)]


@pytest.mark.parametrize(("budget", "filled"), [(2048, 0.97), (8192, 0.94)])
def test_realistic_lengths_fill_their_bins(budget: int, filled: float) -> None:
    """Also where a bin has room for two pairs or three: longest first into the emptiest alone fills 0.90."""
    lengths = lognormal(128, 800)
    assert sum(lengths) / (budget * len(fill_bins(lengths, budget))) >= filled


def test_bins_are_level_where_that_costs_none() -> None:
    lengths = lognormal(128, 400)
    loads = [sum(lengths[i] for i in members) for members in fill_bins(lengths, 8192)]
    assert len(loads) == -(-sum(lengths) // 8192)
    assert max(loads) <= 1.02 * sum(loads) / len(loads)
