"""The order of pairs: a function of seed and epoch, split over ranks without repeating or dropping any.

accelerate's samplers repeat pairs on ragged data (17 pairs on 2 processes: some seen twice); ours never does.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from lorafocal.arguments import FocalPOConfig
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.interrupt import end_workers_at_exit, left_to_the_trainer
from lorafocal.resume import changes


def shuffled(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """Every pair once, in an order that depends on seed and epoch alone."""
    order = list(range(num_pairs))
    random.Random(f"lorafocal pairs {seed} {epoch}").shuffle(order)
    return order


class StepSampler(Sampler[list[int]]):
    """One list of indices an optimiser step: this rank's share of the step's pairs, possibly empty.

    The last step of an epoch is short. `seed` None keeps the data's order (evaluation, and data that a step ordered).
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


def order_seed(args: FocalPOConfig) -> int | None:
    """By which each epoch's order is drawn; None keeps that of the data."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return None if args.keep_order else seed


def order_of(pairs: Sequence[TokenizedPair], args: FocalPOConfig) -> dict[str, Any]:
    """What decides which pairs a step sees: with another, a resumed run would see some twice and others never."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(4, "little") + array("q", ids).tobytes())
    return {"pairs_per_step": args.pairs_per_step, "seed": order_seed(args), "tokens_sha256": digest.hexdigest()}


def check_same_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume (`InputError`) where the rest of the epoch would not be the rest."""
    if differ := changes(saved, now, ()):
        raise InputError(
            "the checkpoint's run took its pairs in other steps (then -> now), and some would be seen twice, others"
            " never:\n  " + "\n  ".join(differ) + "\nresume with the data and settings of then, or train anew"
        )


def step_loader(pairs: Sized, collator: Any, args: FocalPOConfig, *, seed: int | None) -> DataLoader:
    """Batches of whole steps, this rank's share of each.

    Plain and unprepared: accelerate's loader repeats pairs on ragged data.
    """
    if args.dataloader_num_workers:
        end_workers_at_exit()
    sampler = StepSampler(len(pairs), args.pairs_per_step, seed=seed, rank=args.process_index, world=args.world_size)
    return DataLoader(
        pairs,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=left_to_the_trainer,
    )


class NumberedPairs(Dataset[TokenizedPair]):
    """Pairs whose ids are their places in `pairs`: ids of a user may repeat."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> TokenizedPair:
        return replace(self.pairs[place], id=str(place))
