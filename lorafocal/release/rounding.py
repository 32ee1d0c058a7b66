"""One tensor of a merge: float32 arithmetic, one cast at the end, and what that left of the change."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.release.deltas import Change
from lorafocal.release.survival import LayerSurvival, measure_survival

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. Raises InputError by the tensor's name where a value is too large for it."""
    stored = weight.to(dtype)
    if dtype == torch.float16 and stored.isinf().any():
        most = weight.abs().amax().item()
        raise InputError(
            f"--dtype float16: {name} has values up to {most:.3g}, and float16 ends at {torch.finfo(dtype).max:.0f}:"
            " choose bfloat16 or float32"
        )
    return stored


def rounded_change(name: str, weight: Tensor, change: Change, dtype: torch.dtype) -> tuple[Tensor, LayerSurvival]:
    """The changed tensor `name` in `dtype`; `weight` is the one that training saw, and stays as it is.

    Raises InputError where the change is of another shape, or overflows.
    """
    part = weight if change.rows is None else weight[_existing(name, change.rows, len(weight))]
    if tuple(part.shape) != change.shape:
        raise InputError(
            f"the adapter's change of {name} is {change.shape}, the base needs {tuple(part.shape)}: another base's"
        )
    wide = part.float()
    delta = change.delta(wide)
    stored = rounded(name, change.apply(wide, delta), dtype)
    survival = measure_survival(name.removesuffix(".weight"), part, delta, stored)
    if change.rows is None:
        return stored, survival
    whole = rounded(name, weight, dtype).clone()  # a cast to its own dtype is the base's tensor
    whole[change.rows] = stored
    return whole, survival


def _existing(name: str, rows: Tensor, count: int) -> Tensor:
    if int(rows.max()) >= count:
        raise InputError(f"the adapter changes row {int(rows.max())} of {name}, which has {count}: another base's")
    return rows
