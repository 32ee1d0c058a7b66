"""Losses over the whole step on two ranks: each learns what one rank alone would, also of pairs it does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lorafocal.objectives import build_objective
from lorafocal.whole_step import Share, shared_out
from tests.engine.forked import both
from tests.objectives.test_oracles_of_steps import in_packs, inputs

pytestmark = pytest.mark.engine

NAMES = ("beta-dpo", "gamma-simpo", "group-dpo", "relative-dpo", "mpo")
SPLITS = (([[5, 1], [0, 7, 2, 4, 3, 6]], []), ([], [[0, 1, 2, 3, 4, 5, 6, 7]]), ([[6], [2, 0]], [[1, 3], [7], [4, 5]]))


def shares(name: str, packs: list[list[int]]) -> tuple[list[Share], Any]:
    whole = inputs()
    return shared_out(build_objective(name), in_packs(whole, *packs), {}, torch.device("cpu"), whole.num_groups)


def numbers_of(packs: list[list[int]], given: list[Share]) -> dict[str, Any]:
    """What each pair is told, by its place."""
    found = {}
    for members, share in zip(packs, given, strict=True):
        of_others: list[Any] = [] if share.slopes_of_others is None else share.slopes_of_others.tolist()
        whose = [members[pair] for pair in share.inputs.others.pair.tolist()] if of_others else []  # type: ignore[union-attr]
        for place, pair in enumerate(members):
            own = [share.losses.losses, *share.slopes]
            theirs = [slope for slope, of in zip(of_others, whose, strict=True) if of == pair]
            found[str(pair)] = [float(column[place]) for column in own] + theirs
    return found


def of_this_rank(_: Path) -> list[Any]:
    told = []
    for name in NAMES:
        for split in SPLITS:
            packs = split[dist.get_rank()]
            given, state = shares(name, packs)
            told.append((numbers_of(packs, given), {key: value.tolist() for key, value in state.items()}))
    return told


@pytest.mark.row("15")
def test_pairs_of_all_ranks_make_one_step(tmp_path: Path) -> None:
    together = both(of_this_rank, tmp_path)
    assert together.code == 0, together.output
    cases = [(name, split) for name in NAMES for split in SPLITS]
    for (name, split), *told in zip(cases, *together.ranks, strict=True):
        packs = split[0] + split[1]
        given, state = shares(name, packs)
        wanted = numbers_of(packs, given)
        for numbers, left in told:
            for pair, found in numbers.items():
                assert found == pytest.approx(wanted[pair], rel=1e-10, abs=1e-13), (name, split, pair)
            for key, value in state.items():
                assert torch.equal(torch.tensor(left[key], dtype=torch.float64), value), (name, key)
        assert {pair for numbers, _ in told for pair in numbers} == set(wanted)
