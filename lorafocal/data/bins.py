"""Lengths into bins: which pairs of a step are computed together."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def fill_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Items of the given lengths into few bins of at most `budget`, level ones where as few bins can be level.

    Best fit, longest first, says how many bins are enough; of as many or fewer, the first that longest-first placing
    into the emptiest keeps within the budget. An item longer than the budget gets a bin of its own. Every index
    occurs exactly once, each bin in ascending order, bins by their first index.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _full_bins(longest_first, lengths, budget)
    for count in range(max(1, -(-sum(lengths) // budget)), len(bins) + 1):
        if level := _level_bins(longest_first, lengths, budget, count):
            bins = level
            break
    return sorted(sorted(members) for members in bins if members)


def padded_bins(lengths: Sequence[int], budget: int, *, rows: Sequence[int]) -> list[list[int]]:
    """Neighbours in length together, while their padded rows, `rows` of each pair, stay within the budget."""
    bins: list[list[int]] = []
    used = 0
    for item in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if bins and (used + rows[item]) * lengths[item] <= budget:
            bins[-1].append(item)
            used += rows[item]
        else:
            bins.append([item])
            used = rows[item]
    return bins


def _full_bins(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`order` over bins, each item into the one that it leaves the least room in, a new one where none has room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each bin, ascending
    for item in order:
        at = bisect_left(rooms, (lengths[item], 0))
        if at == len(rooms):
            room, which = budget, len(bins)
            bins.append([])
        else:
            room, which = rooms.pop(at)
        bins[which].append(item)
        insort(rooms, (room - lengths[item], which))
    return bins


def _level_bins(order: list[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """`order` over `count` bins, each item into the emptiest; None where one fits nowhere but would fit a new bin."""
    fill = [(0, which) for which in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for item in order:
        used, which = heapq.heappop(fill)
        if used and used + lengths[item] > budget:
            return None
        bins[which].append(item)
        heapq.heappush(fill, (used + lengths[item], which))
    return bins
