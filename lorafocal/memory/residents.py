"""What a GPU holds whatever the tokens of a pack: weights, what is trained, gradients, optimiser states, reference."""

from __future__ import annotations

from collections.abc import Iterator

from lorafocal.memory.setup import WIDE, Setup
from lorafocal.memory.shape import Linear, Shape
from lorafocal.references.strategy import BASE


def weight_bytes(shape: Shape, setup: Setup) -> int:
    """The base as `load_base` holds it: its inner matrices quantised or not, all else in its dtype."""
    rotary = shape.rotations * 2 * WIDE * (shape.head_dim // 2)  # frequencies, and their original values
    rest = (shape.parameters - shape.linear_parameters + shape.family.scalars) * setup.width + rotary
    return rest + shape.layers * sum(_matrix_bytes(linear, setup) for linear in shape.linears)


_BLOCK, _OUTER_BLOCK = 64, 256  # bitsandbytes: entries that share a scale; scales that share one


def _matrix_bytes(linear: Linear, setup: Setup) -> int:
    """A matrix with its scales: a row each in 8 bits; in 4 bits a block each, and a table of the 16 values."""
    if setup.quantization is None:
        return linear.entries * setup.width
    if setup.quantization == "int8":
        return linear.entries + WIDE * linear.rows
    blocks = -(-linear.entries // _BLOCK)
    scales = WIDE * blocks
    if setup.quantization.endswith(
        "-double"
    ):  # a byte each, with scales, a table of 256 values and a mean of their own
        scales = blocks + WIDE * (-(-blocks // _OUTER_BLOCK) + 256 + 1)
    return -(-linear.entries // 2) + scales + WIDE * 16


def low_rank_tensors(shape: Shape, setup: Setup) -> Iterator[int]:
    """Entries of each tensor of the low-rank layers."""
    for layer in range(shape.layers):
        for name, linear in shape.layer_linears(layer):
            if rank := setup.rank_of(name):
                yield rank * linear.columns
                yield rank * linear.rows
                if setup.use_dora:
                    yield linear.rows


def trained_tensors(shape: Shape, setup: Setup) -> Iterator[int]:
    """Entries of each tensor that is trained; all are held in fp32."""
    yield from low_rank_tensors(shape, setup)
    for name, sizes in shape.modules():
        if setup.saves(name) and not (setup.full and shape.tied and name == "lm_head"):
            yield from sizes
    if setup.trainable_tokens and not setup.full:
        yield setup.trainable_tokens * shape.hidden_size


def adapter_parameters(shape: Shape, setup: Setup) -> int:
    return sum(trained_tensors(shape, setup))


def adapter_bytes(shape: Shape, setup: Setup) -> int:
    return WIDE * adapter_parameters(shape, setup)


def gradient_bytes(shape: Shape, setup: Setup, gpus: int = 1) -> int:
    """Gradients in fp32; data parallel runs hold them once more, in the buckets that are exchanged."""
    return WIDE * adapter_parameters(shape, setup) * (1 if gpus == 1 else 2)


_SMALL, _PAGED_FROM, _STATE_BLOCK = 4096, 100_000, 256  # bitsandbytes: kept in 32 bits below; paged from; per scale


def optimizer_bytes(shape: Shape, setup: Setup, *, on_gpu: bool = False) -> int:
    """What the optimiser `setup.optim` remembers; `on_gpu`: without what paging may move to the machine's memory."""
    if setup.optim == "sgd":
        return 0
    total = 0
    for entries in trained_tensors(shape, setup):
        if on_gpu and setup.optim.startswith("paged") and entries >= _PAGED_FROM:
            continue
        if setup.optim.endswith("8bit") and entries >= _SMALL:
            total += 2 * entries + 2 * WIDE * -(-entries // _STATE_BLOCK)
        else:
            total += 2 * WIDE * entries
    return total


def reference_bytes(shape: Shape, setup: Setup) -> int:
    """What reference and guide hold beside the policy: nothing, adapters, or a second model of this shape.

    Finished adapters are taken to be as large as the policy's own; a moving average to grow to `_GROWN` times that.
    """
    if setup.reference == "separate_model":
        return weight_bytes(shape, setup) + setup.guide * adapter_bytes(shape, setup)
    copies = _COPIES.get(setup.reference, 0) + sum(member != BASE for member in setup.members) + setup.guide
    return copies * adapter_bytes(shape, setup)


_GROWN = 3  # times the policy's rank, for a moving average: what successive policies share counts once
_COPIES = {"frozen_copy": 1, "adapter": 1, "moving": 1, "moving-soft": _GROWN}
