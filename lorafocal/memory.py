"""Bytes and floating-point operations of a run, from a model's shape alone: pure arithmetic, no torch.

Residents (weights, adapters, their gradients, optimiser states) do not depend on the tokens of a pack; activations
grow with them, by one of three tiers: keep all (`none`), compute gate and up again (`mlp`), compute every layer again
(`full`). `choose` weighs them. docs/memory.md has the formulas and how well they agree with what was counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorafocal.errors import InputError
from lorafocal.ops.shapes import Lengths, Linear, Setup, Shape

TIERS = ("none", "mlp", "full")
HEAD_CHUNK_ELEMENTS = 2**26  # entries of the largest logits chunk: 256 MiB in fp32

MAX_TOKENS = 16384  # larger packs gain nothing: the matrix products are at their peak long before
TOKEN_STEP = 64  # budgets are multiples
SLACK = 0.06  # of the memory that weights leave: what the allocator cannot use, workspaces of the matrix products
WIDE = 4  # bytes of what is held in fp32 whatever the dtype: norms, sums of softmax, all that is trained


# ---- residents ----------------------------------------------------------------------------------------------------


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


def trained_tensors(shape: Shape, setup: Setup) -> Iterator[int]:
    """Entries of each tensor that is trained; all are held in fp32."""
    for layer in range(shape.layers):
        for name, linear in shape.layer_linears(layer):
            if rank := setup.rank_of(name):
                yield rank * linear.columns
                yield rank * linear.rows
                if setup.use_dora:
                    yield linear.rows
    for name, sizes in shape.modules():
        if setup.saves(name):
            yield from sizes
    if setup.trainable_tokens:
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
    """What the reference holds beside the policy: nothing, a copy of the adapter, or a second model of this shape."""
    if setup.reference == "separate_model":
        return weight_bytes(shape, setup)
    return adapter_bytes(shape, setup) if setup.reference == "frozen_copy" else 0


def sharded_bytes(parameters: int, gpus: int, stage: int, *, live_reference: bool = False) -> float:
    """Bytes a GPU of full-parameter training in mixed precision under ZeRO stage 0 to 3 (Rajbhandari et al., 2020).

    16 a parameter: bf16 weights and gradients, fp32 master and two moments. Stage 2 splits all but the weights, stage
    3 all; a live reference is one more set of weights, split as those are.
    """
    weights, gradients, states = (size / (gpus if stage >= splits else 1) for size, splits in ((2, 3), (2, 2), (12, 1)))
    return parameters * (weights * (2 if live_reference else 1) + gradients + states)


# ---- what grows with the tokens -----------------------------------------------------------------------------------


def activation_bytes_per_token(shape: Shape, setup: Setup, tier: str) -> float:
    """Bytes that a forward saves for its backward, a token row of a pack of typical pairs.

    Raises InputError for the tier `mlp` where PEFT's own adapter functions are used, which have it not.
    """
    ends = _end_bytes(shape, setup)
    if tier == "full":
        return ends + shape.layers * setup.width * shape.hidden_size
    # The first norm reads embeddings, which nothing trains, so transformers' own saves nothing there.
    first_norm = WIDE if setup.fused else (shape.hidden_size + 1) * WIDE
    return (
        ends
        + _rotary_bytes(shape, setup)
        - first_norm
        + sum(_layer_bytes(shape, setup, tier, layer) for layer in range(shape.layers))
    )


def _end_bytes(shape: Shape, setup: Setup) -> float:
    """What the last norm and the head save: of each answer's row its gradient, label and log-prob."""
    answers = setup.lengths.answers / setup.lengths.rows
    last_norm = shape.hidden_size * (setup.width if setup.fused else WIDE) + WIDE
    return last_norm + answers * (setup.width * shape.hidden_size + 12)


def _rotary_bytes(shape: Shape, setup: Setup) -> int:
    """Cosines and sines of a row, which all layers share."""
    return shape.rotations * 2 * setup.width * shape.head_dim


def _layer_bytes(shape: Shape, setup: Setup, tier: str, layer: int) -> float:
    """What one decoder layer saves, a row."""
    kept: float = _norm_bytes(shape, setup) + _attention_bytes(shape, setup) + _mlp_bytes(shape, setup, tier)
    inputs: dict[str, int] = {}
    for name, linear in shape.layer_linears(layer):
        rank, saves = setup.rank_of(name), setup.saves(name)
        kept += setup.width * rank
        if not rank and not saves:
            continue
        kept += setup.use_dora * 2 * setup.width * linear.rows  # the base's product and the adapter's
        if setup.dropout and rank and (layer or linear.reads != "normed"):  # embeddings, again, need no gradient
            kept += linear.columns * (1 if setup.attention == "flash" else WIDE)  # the mask
        # PEFT casts its input for each adapter, so in bf16 every one keeps a copy; in fp32 all keep the same tensor.
        shared = linear.reads if setup.width == WIDE and not setup.dropout else name
        inputs[shared] = linear.columns
    return kept + (0 if setup.fused else setup.width * sum(inputs.values()))


def _norm_bytes(shape: Shape, setup: Setup) -> float:
    """Inputs of the norms, widened to fp32 by transformers' own, and a scale a row."""
    width = setup.width if setup.fused else WIDE
    kept: float = len(shape.family.norms) * (shape.hidden_size * width + WIDE)
    if shape.family.head_norms:
        kept += (shape.query_size + shape.kv_size) * width + (shape.heads + shape.kv_heads) * WIDE
    return kept


def _attention_bytes(shape: Shape, setup: Setup) -> float:
    """Queries, keys, values and outputs, and the log of the softmax's sums."""
    at, width = setup.lengths, setup.width
    kept: float = 2 * shape.query_size * width + shape.heads * WIDE
    second = at.prompt + at.rejected  # keys of the rejected answer's segment, gathered
    if setup.attention == "flash":
        return kept + 2 * shape.kv_size * width * (at.prompt + at.chosen + second) / at.rows
    joined = shape.query_size + shape.kv_size if shape.family.joined else 0  # values are a view of all three
    kept += (2 * shape.kv_size * (1 + second / at.rows) + joined) * width
    mask = width * at.rejected * second / at.rows
    return kept + mask + (shape.query_size * width if setup.fused else 0)  # segments are joined to one output


def _mlp_bytes(shape: Shape, setup: Setup, tier: str) -> float:
    inner = shape.intermediate_size * setup.width
    if shape.family.joined:
        return (4 if setup.fused else 3) * inner
    if setup.fused:
        return 0 if tier == "mlp" else 2 * inner
    return 3 * inner  # gate, its activation, up; the product is the input of down's adapter


def work_bytes_per_token(shape: Shape, setup: Setup, tier: str) -> float:
    """Bytes beside the saved ones at the peak, a row: in the backward of the last norm, or of the last layer.

    The tier `full` has that layer's activations there again, and keeps the rotations as every layer's argument.
    """
    hidden, inner, width = shape.hidden_size, shape.intermediate_size, setup.width
    narrow = width < WIDE
    if setup.fused:
        layer: float = (3 * inner + 2 * hidden) * width
        layer += WIDE * inner if narrow and setup.attention == "sdpa" else 0  # no GPU: products widen their factors
    else:
        layer = 2 * inner * width + (WIDE * inner + 10 * hidden if narrow else hidden * width)
    if tier == "mlp":
        layer += 2 * inner * width
    if tier == "full":
        layer += _layer_bytes(shape, setup, "none", shape.layers - 1) + _rotary_bytes(shape, setup)
    return max(18 * hidden, layer - _end_bytes(shape, setup))  # what the ends saved is gone by then


def head_chunk_bytes(shape: Shape, setup: Setup) -> int:
    """Peak of the log-prob head beside what it saves: a chunk's logits in fp32, and their error where narrower.

    A head that is trained has a gradient in fp32 and a cast of its weights beside that.
    """
    rows = max(1, HEAD_CHUNK_ELEMENTS // shape.vocab_size)
    narrow = setup.width if setup.width < WIDE else 0
    trained = shape.head_parameters if setup.saves("lm_head") else 0
    return (rows * shape.vocab_size + trained) * (WIDE + narrow)


def cast_bytes(shape: Shape, setup: Setup, tier: str) -> int:
    """Adapters in bf16, which PEFT's way saves beside those in fp32; not where a layer is computed again."""
    cast = not setup.fused and setup.width < WIDE and tier == "none"
    return setup.width * adapter_parameters(shape, setup) if cast else 0


def fixed_bytes(shape: Shape, setup: Setup, tier: str) -> int:
    """What a pass needs whatever its tokens: the head's chunk, casts of adapters, the largest matrix de-quantised."""
    largest = max(linear.entries for linear in shape.linears) * setup.width
    fixed = head_chunk_bytes(shape, setup) + cast_bytes(shape, setup, tier)
    return fixed + (largest if setup.quantization else 0)


def pack_bytes(shape: Shape, setup: Setup, tier: str, tokens: float) -> float:
    """Peak of one pack's forward and backward, beside the residents."""
    per_token = activation_bytes_per_token(shape, setup, tier) + work_bytes_per_token(shape, setup, tier)
    return fixed_bytes(shape, setup, tier) + tokens * per_token


# ---- the choice ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """Token rows of a pack and the tier of activations, with the reason in words."""

    tokens: int
    tier: str
    reason: str
    fits: bool = True


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
        return Choice(longest_pair, tier, reason, fits=False)
    tier = min(roomy, key=lambda tier: relative_time(shape, setup, tier, roomy[tier]))
    others = ", ".join(f"{other} {tokens}" for other, tokens in budgets.items() if other != tier)
    reason = f"{roomy[tier]} token rows fit with tier {tier}" + (f" ({others})" if others else "")
    return Choice(roomy[tier], tier, reason)


_NO_MLP = (
    "training.activation_checkpointing: mlp computes gate and up again, which PEFT's own adapter functions cannot: use"
    " none or full, or `kernels.adapters: auto` without DoRA and dropout"
)


def tokens_that_fit(shape: Shape, setup: Setup, free_bytes: float, tier: str, longest_pair: int = 0) -> int:
    """The largest budget, in steps of 64 and at most 16384, or the longest pair; not above 0 where nothing fits."""
    per_token = pack_bytes(shape, setup, tier, 1) - pack_bytes(shape, setup, tier, 0)
    tokens = int((free_bytes - fixed_bytes(shape, setup, tier)) / per_token)
    return min(max(MAX_TOKENS, longest_pair), tokens // TOKEN_STEP * TOKEN_STEP)


# Token rows at which what every pack costs (launches, small products; de-quantising all matrices) equals its products.
_KNEE, _KNEE_QUANTIZED = 256, 700


def relative_time(shape: Shape, setup: Setup, tier: str, tokens: int) -> float:
    """Operations a pair, and what small packs add to them."""
    knee = _KNEE if setup.quantization is None else _KNEE_QUANTIZED
    return flops_per_pair(shape, setup, tier=tier) * (1 + knee / tokens)


# ---- operations ---------------------------------------------------------------------------------------------------


def flops_per_pair(
    shape: Shape,
    setup: Setup,
    lengths: Lengths | None = None,
    *,
    tier: str = "none",
    live_reference: bool | None = None,
    shared: bool = True,
) -> float:
    """Operations (a product and its sum are 2) of one pair's training step, for `lengths` or the setup's.

    Through frozen matrices of N entries, 2N a row forward and 2N backward; adapters 2N_a forward and 4N_a backward;
    attention 4 a visible pair, head and dimension, two and a half times that backward; the head 4HV a completion token.
    `shared`: the prompt is computed once, not once an answer. `live_reference` (by default as the setup says) adds a
    forward without adapters.
    """
    at = lengths or setup.lengths
    live = setup.reference not in ("none", "cached") if live_reference is None else live_reference
    rows, seen = at.rows, at.visible(shape.sliding_window)
    if not shared:
        alone = Lengths(at.prompt, 0, 0)
        rows, seen = rows + at.prompt, seen + alone.visible(shape.sliding_window)
    base = 2 * shape.linear_parameters * rows
    attention = 4 * shape.query_size * seen * shape.layers
    adapters = 2 * adapter_parameters(shape, setup) * rows
    head = 2 * shape.head_parameters * at.answers
    total = 2 * base + 3 * adapters + 3.5 * attention + 2 * head
    if tier == "full":
        total += base + adapters + attention
    elif tier == "mlp":
        again = sum(linear.entries for linear in shape.linears if linear.reads == "hidden")
        total += 2 * shape.layers * again * rows
    return total + (base + attention + head if live else 0)


def minimum_flops_per_pair(shape: Shape, setup: Setup, lengths: Lengths | None = None) -> float:
    """The least that the exact result needs: the prompt once, nothing computed again, no reference forward."""
    return flops_per_pair(shape, setup, lengths, live_reference=False)
