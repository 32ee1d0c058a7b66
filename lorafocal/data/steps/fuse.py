"""Several margins of a pair as one number: the log-odds that the chosen answer is the better one.

BeeS ("Less is More", Deng et al. 2025, arXiv:2502.14560, Eq. 3): each margin m becomes a probability by a straight
line between two bounds, p = (clip(m, L, U) - L) / (U - L), and the sources are fused as independent,

    P = prod p / (prod p + prod (1 - p)),   log-odds = sum [log p - log(1 - p)]

L is -2; U rises from 2/3 of the largest external, or half of the largest implicit margin by 1 while at least 30 pairs,
and no fewer than the largest is above U, lie beyond (as the authors' search is told of). Margins of another scale need
bounds of their own. The end points 0 and 1 are taken one float64 rounding inside, so that pairs beyond one source's
bound are still ranked by the other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import log, log1p

from lorafocal.errors import InputError

LOWEST = -2.0
TAIL = 30  # pairs beyond the upper bound, at least
_EDGE = sys.float_info.epsilon


def fused(columns: Mapping[str, Sequence[float]], bounds: Mapping[str, Sequence[float]], where: str) -> list[float]:
    """Log-odds (nats) of each pair from its margins in `columns`, by name; `bounds` in place of the paper's.

    Raises InputError for a source whose bounds leave no room between them.
    """
    odds = [0.0] * len(next(iter(columns.values())))
    for name, values in columns.items():
        low, high = bounds.get(name) or (LOWEST, upper(values, external=name == "score_gap"))
        if not low < high:
            raise InputError(f"{where}.bounds: all of {name} is below {low:g}; say {{{name}: [lower, upper]}} yourself")
        for row, value in enumerate(values):
            share = (min(max(value, low), high) - low) / (high - low)
            share = min(max(share, _EDGE), 1 - _EDGE)
            odds[row] += log(share) - log1p(-share)
    return odds


def upper(values: Sequence[float], *, external: bool) -> float:
    """The upper bound of one source's margins."""
    largest = max(values)
    bound = max(float(int(largest / (1.5 if external else 2.0))), LOWEST + 1)
    while bound <= largest:
        beyond = sum(value >= bound for value in values)
        if beyond < TAIL or beyond < largest - bound:
            break
        bound += 1.0
    return min(bound, largest)
