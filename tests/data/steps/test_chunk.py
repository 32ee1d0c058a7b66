"""Chunks hold every pair once."""

from __future__ import annotations

from itertools import chain

import pytest

from lorafocal.data.steps.chunk import chunk
from lorafocal.errors import InputError
from tests.data.steps.made import ids, made, shuffled

PAIRS = made(20)


def chunks(pairs=PAIRS, of: int = 3, *, ordered: bool = False, seed: int | None = None) -> list[list[str]]:
    return [
        ids(chunk(pairs, take=take, of=of, seed=seed, ordered=ordered, where="data.steps.0.chunk").pairs)
        for take in range(1, of + 1)
    ]


@pytest.mark.row("55")
@pytest.mark.parametrize("ordered", [False, True])
def test_each_pair_is_in_one_chunk_and_sizes_differ_by_one(ordered: bool) -> None:
    found = chunks(ordered=ordered)
    assert sorted(chain(*found)) == sorted(ids(PAIRS))
    assert [len(part) for part in found] == [6, 7, 7]


def test_of_an_order_they_are_its_parts() -> None:
    assert [*chain(*chunks(ordered=True))] == ids(PAIRS)


def test_drawn_ones_depend_on_ids_and_seed_alone() -> None:
    assert [{*part} for part in chunks(shuffled(PAIRS))] == [{*part} for part in chunks()]
    assert chunks(seed=1) != chunks()
    assert all(part == [name for name in ids(PAIRS) if name in part] for part in chunks())


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(InputError, match="chunk 1 of 3 of 2 pairs is empty"):
        chunks(PAIRS[:2])
