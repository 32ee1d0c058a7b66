"""Bytes and floating-point operations of a run, from a model's shape alone: pure arithmetic, no torch.

Residents (weights, what is trained, its gradients, optimiser states) do not depend on the tokens of a pack; engines
split them over GPUs. Activations grow with the tokens, by one of three tiers: keep all (`none`), compute gate and up
again (`mlp`), compute every layer again (`full`). `choose` weighs them. docs/memory.md has the formulas and how well
they agree with what was counted.
"""

from lorafocal.memory.activations import (
    HEAD_CHUNK_ELEMENTS,
    ROW_TILE,
    activation_bytes_per_token,
    cast_bytes,
    head_chunk_bytes,
    head_rows,
    pack_bytes,
    peaks,
    work_bytes_per_token,
)
from lorafocal.memory.choice import (
    MAX_TOKENS,
    SLACK,
    TIERS,
    TOKEN_STEP,
    Choice,
    choose,
    relative_time,
    room_for_packs,
    tiers_of,
    tokens_that_fit,
)
from lorafocal.memory.operations import flops_per_pair, minimum_flops_per_pair
from lorafocal.memory.residents import (
    adapter_bytes,
    adapter_parameters,
    gradient_bytes,
    optimizer_bytes,
    reference_bytes,
    trained_tensors,
    weight_bytes,
)
from lorafocal.memory.setup import WHOLE, Lengths, Setup
from lorafocal.memory.shape import Shape
from lorafocal.memory.shards import SHARING, Residents, Traffic, held_dtype, residents, starting_bytes, traffic

__all__ = [
    "HEAD_CHUNK_ELEMENTS",
    "MAX_TOKENS",
    "ROW_TILE",
    "SHARING",
    "SLACK",
    "TIERS",
    "TOKEN_STEP",
    "WHOLE",
    "Choice",
    "Lengths",
    "Residents",
    "Setup",
    "Shape",
    "Traffic",
    "activation_bytes_per_token",
    "adapter_bytes",
    "adapter_parameters",
    "cast_bytes",
    "choose",
    "flops_per_pair",
    "gradient_bytes",
    "head_chunk_bytes",
    "head_rows",
    "held_dtype",
    "minimum_flops_per_pair",
    "optimizer_bytes",
    "pack_bytes",
    "peaks",
    "reference_bytes",
    "relative_time",
    "residents",
    "room_for_packs",
    "starting_bytes",
    "tiers_of",
    "tokens_that_fit",
    "traffic",
    "trained_tensors",
    "weight_bytes",
    "work_bytes_per_token",
]
