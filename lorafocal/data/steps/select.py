"""`select` and `order`: some of the pairs, or all in an order, by a quantity.

Sources: external margin and implicit margin together, BeeS (arXiv:2502.14560); implicit margin of a first run, SeRA
(arXiv:2410.09362, its selection); reference gap (arXiv:2501.15109); CHES, lowest first (arXiv:2410.08847); easy to hard
by score gap, Curry-DPO (arXiv:2403.07230). Ties are broken by a checksum of the id, so the order of the rows decides
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafocal.data.mixture import draw
from lorafocal.data.sources import Preference
from lorafocal.data.steps.fuse import fused
from lorafocal.data.steps.outcome import Outcome
from lorafocal.data.steps.quantities import read_scores, values_of
from lorafocal.errors import InputError
from lorafocal.schema.steps import Order, Select


def select(pairs: Sequence[Preference], settings: Select, where: str) -> Outcome:
    """The pairs that are kept, in the order they were in. Raises InputError where none or all would be."""
    pairs, unscored = those_scored(pairs, settings, where)
    total, keep = len(pairs), settings.keep
    count = round(keep * total) if isinstance(keep, float) else keep
    if count >= total:
        raise InputError(f"{where}.keep: {keep} of {total} pairs keeps them all; lower it, or remove the step")
    if count < 1:
        raise InputError(f"{where}.keep: {keep} of {total} pairs keeps none; raise it")
    values = quantity_of(pairs, settings, where)
    ranked = ranking(pairs, values)
    if settings.which == "highest":
        kept = ranked[total - count :]
    else:
        start = (total - count) // 2 if settings.which == "middle" else 0
        kept = ranked[start : start + count]
    chosen = set(kept)
    numbers = [values[row] for row in kept]
    named = " and ".join(settings.quantities)
    words = f"{settings.which} {named}, {min(numbers):.4g} to {max(numbers):.4g} of {span(values)}{unscored}"
    return Outcome(
        [pair for row, pair in enumerate(pairs) if row in chosen], words, {"values": ends_of(numbers, values)}
    )


def order(pairs: Sequence[Preference], settings: Order, where: str) -> Outcome:
    """All pairs, the highest or the lowest first."""
    pairs, unscored = those_scored(pairs, settings, where)
    values = quantity_of(pairs, settings, where)
    ranked = ranking(pairs, values)
    if settings.first == "highest":
        ranked.reverse()
    named = f"{settings.first} {' and '.join(settings.quantities)} first"
    words = f"{named}, over {span(values)}; trained in this order, which data_seed no longer shuffles{unscored}"
    return Outcome([pairs[row] for row in ranked], words, {"values": ends_of(values, values)})


def those_scored(pairs: Sequence[Preference], settings: Select | Order, where: str) -> tuple[list[Preference], str]:
    """The pairs that the file of scores has, and words on how many it lacks; all, where that is an error."""
    if settings.unscored == "error" or settings.scores is None:
        return list(pairs), ""
    known = read_scores(Path(settings.scores), where)
    kept = [pair for pair in pairs if pair.id in known]
    if not kept:
        raise InputError(f"{where}.scores: {settings.scores} has scores of no training pair; it is of other rows")
    lacking = len(pairs) - len(kept)
    return kept, f"; {lacking} without scores left out" if lacking else ""


def quantity_of(pairs: Sequence[Preference], settings: Select | Order, where: str) -> list[float]:
    """One number a pair: the quantity, or the log-odds of several."""
    scores = None if settings.scores is None else Path(settings.scores)
    columns = {name: values_of(pairs, name, scores, where) for name in settings.quantities}
    if len(columns) == 1:
        return next(iter(columns.values()))
    return fused(columns, settings.bounds or {}, where)


def ranking(pairs: Sequence[Preference], values: Sequence[float]) -> list[int]:
    """Rows from the lowest value to the highest."""
    return sorted(range(len(pairs)), key=lambda row: (values[row], draw(0, f"tie {pairs[row].id}")))


def span(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


def ends_of(kept: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    return {"kept_from": min(kept), "kept_to": max(kept), "all_from": min(values), "all_to": max(values)}
