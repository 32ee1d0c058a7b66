"""Label noise: reproducible, a function of each pair's id alone, and its own inverse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorafocal.data.steps.flip import flip, swapped
from lorafocal.errors import InputError
from tests.data.steps.made import made, shuffled

PAIRS = made(400)


def flipped(pairs=PAIRS, share: float = 0.2, seed: int = 0, scores="follow") -> set[str]:
    after = flip(pairs, share=share, seed=seed, scores=scores, where="data.steps.0.flip").pairs
    return {new.id for old, new in zip(pairs, after, strict=True) if new.chosen != old.chosen}


def test_about_the_share_is_flipped() -> None:
    assert len(flipped()) == pytest.approx(80, abs=4 * (400 * 0.2 * 0.8) ** 0.5)
    assert len(flipped(share=1.0)) == 400


def test_neither_order_nor_other_rows_decide() -> None:
    assert flipped(shuffled(PAIRS)) == flipped() == flipped()
    assert flipped(PAIRS[100:]) == {name for name in flipped() if int(name[3:]) >= 100}


def test_a_smaller_share_is_part_of_a_larger_and_seeds_differ() -> None:
    assert flipped(share=0.1) < flipped(share=0.2)
    assert flipped(seed=1) != flipped()


def test_a_flipped_pair_is_judged_the_other_way_round() -> None:
    pair = replace(PAIRS[1], score_chosen=3.0, score_rejected=1.0)
    turned = swapped(pair)
    assert (turned.chosen, turned.rejected) == (pair.rejected, pair.chosen)
    assert (turned.score_chosen, turned.score_rejected) == (1.0, 3.0)
    assert swapped(turned) == pair
    assert swapped(pair, scores="stay").score_chosen == 3.0


def test_noise_that_flips_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.steps\.0\.flip: a share of 1e-06 of 400 pairs flips none"):
        flipped(share=1e-6)
