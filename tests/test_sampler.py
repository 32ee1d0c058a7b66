"""The order of pairs: complete, without repetition, a function of seed and epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafocal.sampler import StepSampler, shuffled


@pytest.mark.row("F1", "55")
@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_over_all_ranks_every_pair_of_an_epoch_is_seen_exactly_once(pairs, per_step, world, epoch):
    ranks = [StepSampler(pairs, per_step, seed=3, rank=rank, world=world) for rank in range(world)]
    for sampler in ranks:
        sampler.epoch = epoch
    steps = [list(sampler) for sampler in ranks]
    assert {len(s) for s in steps} == {len(ranks[0])}
    for number, shares in enumerate(zip(*steps, strict=True)):
        assert sum(map(len, shares)) == min(per_step, pairs - number * per_step)
    assert sorted(i for s in steps for share in s for i in share) == list(range(pairs))


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_ranks():
    alone = list(StepSampler(17, 5, seed=1))
    shares = [list(StepSampler(17, 5, seed=1, rank=rank, world=3)) for rank in range(3)]
    for number, step in enumerate(alone):
        assert sorted(step) == sorted(i for share in shares for i in share[number])


@pytest.mark.row("F2", "57")
def test_epochs_and_seeds_differ_and_repeat():
    assert shuffled(50, 1, 0) == shuffled(50, 1, 0)
    assert len({tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_evaluation_keeps_the_order_of_the_data():
    assert list(StepSampler(5, 2)) == [[0, 1], [2, 3], [4]]
