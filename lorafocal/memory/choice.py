"""Token rows of a pack and the tier of activations: what fits, and of that what takes the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafocal.errors import InputError
from lorafocal.memory.activations import pack_bytes, peaks
from lorafocal.memory.operations import flops_per_pair
from lorafocal.memory.setup import Setup
from lorafocal.memory.shape import Shape
from lorafocal.memory.shards import Residents

TIERS = ("none", "mlp", "full")
MAX_TOKENS = 16384  # larger packs gain nothing: the matrix products are at their peak long before
TOKEN_STEP = 64  # budgets are multiples
SLACK = 0.06  # of the memory that weights leave: what the allocator cannot use, workspaces of the matrix products


@dataclass(frozen=True, slots=True)
class Choice:
    """Token rows of a pack and the tier of activations, with the reason in words."""

    tokens: int
    tier: str
    reason: str
    fits: bool = True
    head_rows: int | None = None  # of a chunk of logits, as in `Setup`


def tiers_of(shape: Shape, setup: Setup) -> tuple[str, ...]:
    """The tiers that these adapter functions have."""
    return TIERS if setup.fused and not shape.family.joined else ("none", "full")


def choose(shape: Shape, setup: Setup, free_bytes: float, longest_pair: int, tiers: Sequence[str] = TIERS) -> Choice:
    """The tier that takes the least time, with as many tokens as fit (at most 16384, or the longest pair).

    `free_bytes` is what the device has beside weights, adapters, gradients and optimiser states; the head's chunk and
    all else that a pass needs is taken off here. `tiers` limits the choice. `fits` is False where a pack of the longest
    pair (in token rows) fits in none of them.
    """
    possible = [tier for tier in tiers if tier in tiers_of(shape, setup)]
    if not possible:
        raise InputError(_NO_MLP)
    budgets = {tier: tokens_that_fit(shape, setup, free_bytes, tier, longest_pair) for tier in possible}
    roomy = {tier: tokens for tier, tokens in budgets.items() if tokens >= longest_pair}
    if not roomy:
        tier = min(possible, key=lambda tier: pack_bytes(shape, setup, tier, longest_pair))
        reason = f"the longest pair has {longest_pair} token rows, and {max(0, budgets[tier]) or 'none'} fit"
        return Choice(longest_pair, tier, reason, fits=False, head_rows=setup.head_rows)
    tier = min(roomy, key=lambda tier: relative_time(shape, setup, tier, roomy[tier]))
    others = ", ".join(f"{other} {tokens}" for other, tokens in budgets.items() if other != tier)
    reason = f"{roomy[tier]} token rows fit with tier {tier}" + (f" ({others})" if others else "")
    return Choice(roomy[tier], tier, reason, head_rows=setup.head_rows)


_NO_MLP = (
    "training.activation_checkpointing: mlp computes gate and up again, which the fused adapter functions can alone:"
    " use none or full, or an adapter without DoRA and dropout under `kernels.adapters: auto`"
)


def room_for_packs(room: float, held: Residents) -> float:
    """What is left for packs of the `room` beside all that is there before the first step: without slack and steps."""
    return (1 - SLACK) * room - held.in_steps


def tokens_that_fit(shape: Shape, setup: Setup, free_bytes: float, tier: str, longest_pair: int = 0) -> int:
    """The largest budget, in steps of 64 and at most 16384, or the longest pair; not above 0 where nothing fits."""
    tokens = min(int((free_bytes - fixed) / per_token) for fixed, per_token in peaks(shape, setup, tier))
    return min(max(MAX_TOKENS, longest_pair), tokens // TOKEN_STEP * TOKEN_STEP)


# Token rows at which what every pack costs (launches, small products; de-quantising all matrices) equals its products.
_KNEE, _KNEE_QUANTIZED = 256, 700


def relative_time(shape: Shape, setup: Setup, tier: str, tokens: int) -> float:
    """Operations a pair, and what small packs add to them."""
    knee = _KNEE if setup.quantization is None else _KNEE_QUANTIZED
    return flops_per_pair(shape, setup, tier=tier) * (1 + knee / tokens)
