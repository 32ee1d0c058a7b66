"""The order of pairs: a function of seed and epoch, split over ranks without repeating or dropping any.

accelerate's samplers repeat pairs on ragged data (17 pairs on 2 processes: some seen twice); ours never does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler


def shuffled(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """Every pair once, in an order that depends on seed and epoch alone."""
    order = list(range(num_pairs))
    random.Random(f"lorafocal pairs {seed} {epoch}").shuffle(order)
    return order


class StepSampler(Sampler[list[int]]):
    """One list of indices an optimiser step: this rank's share of the step's pairs, possibly empty.

    The last step of an epoch is short. `seed` None keeps the data's order (evaluation).
    """

    def __init__(
        self, num_pairs: int, pairs_per_step: int, *, seed: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.num_pairs, self.pairs_per_step, self.seed = num_pairs, pairs_per_step, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    def __len__(self) -> int:
        """Optimiser steps an epoch, the same on every rank."""
        return -(-self.num_pairs // self.pairs_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_pairs)) if self.seed is None else shuffled(self.num_pairs, self.seed, self.epoch)
        for start in range(0, self.num_pairs, self.pairs_per_step):
            yield order[start : start + self.pairs_per_step][self.rank :: self.world]
