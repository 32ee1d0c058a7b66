"""What the cast to a stored dtype leaves of what each layer learned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafocal.errors import InputError

KEPT_WARNING = 0.9  # share of a layer's delta below which the report warns (row 43)
_BLOCK = 1 << 18  # entries that are compared at a time: a few megabytes, which stay in a CPU's cache


@dataclass(frozen=True, slots=True)
class LayerSurvival:
    """What the cast to the output dtype left of one layer's delta D, with Q the cast and W the base.

    D is scaling * B A for LoRA, and W' - W for all else (DoRA, modules and tokens that are trained in full).
    `kept` = <Q(W + D) - Q(W), D> / <D, D>: 1 means that the stored change is on average the learned one, 0
    that it rounded away. `error` = |Q(W + D) - (W + D)| / |D|, Frobenius norms: rounding against what was
    learned; it counts the rounding of W too where W is finer than the output. `delta_norm` is |D|.
    """

    layer: str
    kept: float
    error: float
    delta_norm: float


def measure_survival(layer: str, weight: Tensor, delta: Tensor, stored: Tensor) -> LayerSurvival:
    """`LayerSurvival` of one layer; `weight` and `delta` as before the cast, of one shape. Sums are in float64, over
    blocks, so that little memory is needed. A zero delta is kept. Raises InputError for one too large to be
    measured."""
    squares = along = lost = 0.0
    for before, learned, after in zip(*map(_blocks, (weight, delta, stored)), strict=True):
        change = after.float() - before.to(after.dtype).float()
        squares += _sum(learned * learned)
        along += _sum(change * learned)
        lost += _sum((after.float() - (before.float() + learned)).square())
    if squares == 0:
        return LayerSurvival(layer, 1.0, 0.0, 0.0)
    found = LayerSurvival(layer, along / squares, (lost / squares) ** 0.5, squares**0.5)
    if not all(map(math.isfinite, (found.kept, found.error, found.delta_norm))):
        raise InputError(
            f"the adapter changes {layer} by numbers up to {float(delta.abs().max()):.3g}, which no float32 sum of"
            " squares holds: its file was altered, or its training blew up. Restore it, or use an earlier checkpoint's"
        )
    return found


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.reshape(-1).split(_BLOCK)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def survival_table(survival: Sequence[LayerSurvival], dtype: str) -> str:
    """The layers that keep least and most, and the median, one a line."""
    worst, best = _worst(survival), max(survival, key=lambda layer: layer.kept)
    median = statistics.median(layer.kept for layer in survival)
    error = statistics.median(layer.error for layer in survival)
    return "\n".join(
        [
            f"share of the learned change that {dtype} keeps, {len(survival)} layers",
            f"  least   {worst.kept:8.2%}  rounding {worst.error:.2g} of the change  ({worst.layer})",
            f"  median  {median:8.2%}  rounding {error:.2g} of the change",
            f"  most    {best.kept:8.2%}  rounding {best.error:.2g} of the change  ({best.layer})",
        ]
    )


def _worst(survival: Sequence[LayerSurvival]) -> LayerSurvival:
    return min(survival, key=lambda layer: layer.kept)


def survival_notes(survival: Sequence[LayerSurvival], dtype: str) -> tuple[str, ...]:
    """The warning where layers keep less than `KEPT_WARNING` of what they learned."""
    low = [layer for layer in survival if not layer.kept >= KEPT_WARNING]
    if not low:
        return ()
    worst = _worst(low)
    finer = "" if dtype == "float32" else "merge with --dtype float32, or "
    return (
        f"{len(low)} of {len(survival)} layers keep less than {KEPT_WARNING:.0%} of the learned change "
        f"in {dtype} (worst: {worst.layer}, {worst.kept:.0%}): {finer}publish the adapter without merging it",
    )
