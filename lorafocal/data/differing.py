"""Which tokens of a pair's two answers the other one does not have."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import scored


def differing(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """For each token of either answer whether it is in no block that both have, as difflib matches them.

    As the code of BMC (arXiv:2408.07471) calls it: the rejected answer first, with difflib's own rule that tokens
    which make up over 1 % of a chosen answer of 200 or more start no block.
    """
    chosen_differs, rejected_differs = [True] * len(chosen), [True] * len(rejected)
    for start, other, size in SequenceMatcher(None, rejected, chosen).get_matching_blocks():
        rejected_differs[start : start + size] = [False] * size
        chosen_differs[other : other + size] = [False] * size
    return chosen_differs, rejected_differs


def differs_of(pairs: Sequence[TokenizedPair]) -> Tensor:
    """The same of the scored tokens of B pairs, those of all chosen answers first, (N,) bool."""
    found = [differing(pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    chosen = [mark for pair, (side, _) in zip(pairs, found, strict=True) for mark in scored(side, pair.chosen_turns)]
    rejected = [
        mark for pair, (_, side) in zip(pairs, found, strict=True) for mark in scored(side, pair.rejected_turns)
    ]
    return torch.tensor(chosen + rejected, dtype=torch.bool)
