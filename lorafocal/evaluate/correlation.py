"""How alike two lists of numbers are, pair by pair: Pearson's and Spearman's correlation, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.evaluate.result import Score

RESAMPLES = 2000
AT_A_TIME = 2**22  # numbers held in memory while resampling
Statistic = Callable[[Tensor, Tensor], Tensor]  # (..., n) and (..., n) float64 -> (...)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """The correlation along the last axis; not a number where one of the two does not vary."""
    first, second = (side - side.mean(-1, keepdim=True) for side in (first, second))
    return (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """The correlation of ranks along the last axis; equal values share the mean of their ranks."""
    return pearson(mean_ranks(first), mean_ranks(second))


def spread_ratio(first: Tensor, second: Tensor) -> Tensor:
    """The standard deviation of the first by that of the second, along the last axis."""
    return first.std(-1) / second.std(-1)


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 0.5 on along the last axis: halfway between the counts of values below, and below or equal."""
    ordered = values.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    return (below + torch.searchsorted(ordered, values.contiguous(), right=True)).double() / 2


def with_interval(
    statistic: Statistic,
    first: Sequence[float],
    second: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """`statistic` of two lists of one length, with its 95% percentile bootstrap interval (Efron 1979) over the pairs.

    Raises InputError where a list does not vary, so that nothing can go along with it.
    """
    one, other = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    for side in (one, other):
        if len(side) < 2 or not bool(side.isfinite().all()) or float(side.min()) == float(side.max()):
            raise InputError("a correlation needs two finite numbers or more that are not all alike, on both sides")
    drawn = torch.cat(list(_resampled(statistic, one, other, resamples, torch.Generator().manual_seed(seed))))
    low, high = drawn[drawn.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(float(statistic(one, other)), low, high)


def _resampled(
    statistic: Statistic, one: Tensor, other: Tensor, resamples: int, generator: torch.Generator
) -> Iterator[Tensor]:
    count = len(one)
    rows = max(1, AT_A_TIME // count)
    for start in range(0, resamples, rows):
        places = torch.randint(count, (min(rows, resamples - start), count), generator=generator)
        yield statistic(one[places], other[places])
