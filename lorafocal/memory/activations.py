"""What grows with the tokens of a pack, and what a pass needs beside it."""

from __future__ import annotations

from lorafocal.memory.residents import adapter_parameters
from lorafocal.memory.setup import WIDE, Setup
from lorafocal.memory.shape import Shape

HEAD_CHUNK_ELEMENTS = 2**26  # entries of the largest logits chunk: 256 MiB in fp32
ROW_TILE = 128  # rows of a chunk are multiples: a GPU's matrix products work in tiles of as many
HEAD_SHARE = 1 / 64  # of a device's memory, at most, for a chunk


def activation_bytes_per_token(shape: Shape, setup: Setup, tier: str) -> float:
    """Bytes that a forward saves for its backward, a token row of a pack of typical pairs."""
    ends = _end_bytes(shape, setup)
    if tier == "full":
        return ends + shape.layers * setup.width * shape.hidden_size
    # The first norm reads embeddings; where nothing trains them, transformers' own saves nothing there.
    unsaved = 0 if setup.full else WIDE if setup.fused else (shape.hidden_size + 1) * WIDE
    return (
        ends
        + _rotary_bytes(shape, setup)
        - unsaved
        + sum(_layer_bytes(shape, setup, tier, layer) for layer in range(shape.layers))
    )


def _end_bytes(shape: Shape, setup: Setup) -> float:
    """What the last norm and the head save: of each answer's row its gradient, label and log-prob.

    Where all is trained, the row itself in the gradient's place, its position, and the embeddings' ids.
    With divergences a second gradient, and the reference's row in its place where the head is trained; and their sums.
    """
    answers = setup.lengths.answers / setup.lengths.rows
    last_norm = shape.hidden_size * (setup.width if setup.fused else WIDE) + WIDE + _normed_bytes(shape, setup)
    kept = setup.width * shape.hidden_size * (2 if setup.divergences else 1) + (8 if setup.divergences else 0)
    if not setup.full:
        return last_norm + answers * (kept + 12)
    return last_norm + 8 + answers * (kept + 24)


def _widens_rows(shape: Shape, setup: Setup) -> bool:
    """Whether norms hand on fp32 rows to bf16 products: their weights are fp32, and they do not round in the end."""
    return setup.widened and not shape.family.wide_norms


def _normed_bytes(shape: Shape, setup: Setup, size: int | None = None) -> int:
    """What a norm multiplies by its weight, which is saved where the weight is trained."""
    width = WIDE if shape.family.wide_norms else setup.width
    return width * (size or shape.hidden_size) if setup.full else 0


def _rotary_bytes(shape: Shape, setup: Setup) -> int:
    """Cosines and sines of a row, which all layers share."""
    return shape.rotations * 2 * setup.width * shape.head_dim


def _layer_bytes(shape: Shape, setup: Setup, tier: str, layer: int) -> float:
    """What one decoder layer saves, a row."""
    kept: float = _norm_bytes(shape, setup) + _attention_bytes(shape, setup) + _mlp_bytes(shape, setup, tier)
    if setup.full:
        return kept + setup.width * sum(_inputs_of_trained(shape, setup).values())
    inputs: dict[str, int] = {}
    for name, linear in shape.layer_linears(layer):
        rank, saves = setup.rank_of(name), setup.saves(name)
        kept += setup.width * rank
        if not rank and not saves:
            continue
        kept += setup.use_dora * 2 * setup.width * linear.rows  # the base's product and the adapter's
        if setup.dropout and rank and (layer or linear.reads != "normed"):  # embeddings, again, need no gradient
            kept += linear.columns * (WIDE if setup.attention == "sdpa" else 1)  # the mask: CUDA's kernel keeps a bool
        # PEFT casts its input for each adapter, so in bf16 every one keeps a copy; in fp32 all keep the same tensor.
        shared = linear.reads if setup.width == WIDE and not setup.dropout else name
        inputs[shared] = linear.columns
    return kept + (0 if setup.fused else setup.width * sum(inputs.values()))


def _inputs_of_trained(shape: Shape, setup: Setup) -> dict[str, int]:
    """Entries a row of what the trained linear layers of one decoder layer read, each tensor once.

    Under autocast every layer casts what a wide norm hands it, and keeps its own; the others read narrow tensors.
    """
    inputs: dict[str, int] = {}
    for linear in shape.linears:
        if linear.reads == "heads" and setup.attention == "flash":
            continue  # its kernel keeps its output anyway
        cast = _widens_rows(shape, setup) and linear.reads in ("normed", "hidden")
        inputs[linear.name if cast else linear.reads] = linear.columns
    return inputs


def _norm_bytes(shape: Shape, setup: Setup) -> float:
    """Inputs of the norms, widened to fp32 by transformers' own, and a scale a row."""
    width = setup.width if setup.fused else WIDE
    kept: float = len(shape.family.norms) * (shape.hidden_size * width + WIDE + _normed_bytes(shape, setup))
    if shape.family.head_norms:
        heads = shape.query_size + shape.kv_size
        kept += heads * width + (shape.heads + shape.kv_heads) * WIDE + _normed_bytes(shape, setup, heads)
    return kept


def _attention_bytes(shape: Shape, setup: Setup) -> float:
    """Queries, keys, values and outputs, and the log of the softmax's sums."""
    at, width = setup.lengths, setup.width
    kept: float = 2 * shape.query_size * width + shape.heads * WIDE
    second = at.prompt + at.rejected  # keys of the rejected answer's segment, gathered
    if setup.attention == "flash":
        return kept + 2 * shape.kv_size * width * (at.prompt + at.chosen + second) / at.rows
    if setup.attention == "repeated" and shape.query_size > shape.kv_size:
        kept += 2 * shape.query_size * width * (1 + at.prompt / at.rows)  # copies of both segments; the originals go
    else:
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

    With divergences three in fp32, of which one is gone when the error is made.
    A head that is trained has a gradient in fp32 and a cast of its weights beside that; a tied one of which tokens are
    trained is put together for each pass.
    """
    return _chunk_bytes(shape, setup) + _trained_head_bytes(shape, setup)


def _chunk_bytes(shape: Shape, setup: Setup) -> int:
    rows = setup.head_rows or max(1, HEAD_CHUNK_ELEMENTS // shape.vocab_size)
    return rows * shape.vocab_size * _logit_bytes(setup)


def _trained_head_bytes(shape: Shape, setup: Setup) -> int:
    together = setup.width * (shape.tied and setup.trainable_tokens > 0)
    return shape.head_parameters * (WIDE + _narrow(setup) + together) if trains_head(shape, setup) else 0


def trains_head(shape: Shape, setup: Setup) -> bool:
    """Whether the head's weight has a gradient: trained whole, or tied to embeddings of which tokens are trained."""
    return setup.saves("lm_head") or (shape.tied and setup.trainable_tokens > 0)


def head_rows(shape: Shape, setup: Setup, memory_bytes: float) -> int:
    """Rows of the log-prob head's chunk on a device with so much memory: 2^26 entries, or a 64th of it if that is less.

    In whole tiles, and one at least. The whole memory counts, not what is free of it: a run that goes on later computes
    the same bits.
    """
    most = memory_bytes * HEAD_SHARE / _logit_bytes(setup)
    return max(int(min(most, HEAD_CHUNK_ELEMENTS)) // shape.vocab_size // ROW_TILE, 1) * ROW_TILE


def _logit_bytes(setup: Setup) -> int:
    """Of one entry of a chunk at its peak."""
    return 3 * WIDE if setup.divergences else WIDE + _narrow(setup)


def _narrow(setup: Setup) -> int:
    return setup.width if setup.width < WIDE else 0


def reference_row_bytes(shape: Shape, setup: Setup) -> float:
    """What the reference's pass leaves to the policy's, a row: what divergences make its logits of.

    Where the head is trained, the policy's pass keeps it, and it counts there.
    """
    if not setup.divergences or trains_head(shape, setup):
        return 0
    return setup.width * shape.hidden_size * setup.lengths.answers / setup.lengths.rows


def cast_bytes(shape: Shape, setup: Setup, tier: str) -> int:
    """What is held in fp32 and cast to bf16: adapters by PEFT's way, beside those in fp32, but where a layer is
    computed again; matrices of a widened model until the pass is over."""
    if setup.full:
        return setup.width * shape.linear_parameters if setup.widened else 0
    cast = not setup.fused and setup.width < WIDE and tier == "none"
    return setup.width * adapter_parameters(shape, setup) if cast else 0


def peaks(shape: Shape, setup: Setup, tier: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes whatever the tokens, and a token row, where a pack holds the most: in the head, and in the backward.

    The head's chunk is gone when the last layer's backward begins; what that makes is not there before. The head reads
    the last norm's rows, and of them those of the answers once more. A matrix is de-quantised in layers alone.
    """
    kept = activation_bytes_per_token(shape, setup, tier) + reference_row_bytes(shape, setup)
    casts = cast_bytes(shape, setup, tier) + _trained_head_bytes(shape, setup)
    read = setup.width * shape.hidden_size * (1 + setup.lengths.answers / setup.lengths.rows)
    largest = max(linear.entries for linear in shape.linears) * setup.width if setup.quantization else 0
    return (
        (casts + _chunk_bytes(shape, setup), kept + read),
        (casts + largest, kept + work_bytes_per_token(shape, setup, tier)),
    )


def pack_bytes(shape: Shape, setup: Setup, tier: str, tokens: float) -> float:
    """Peak of one pack's forward and backward, beside the residents."""
    return max(fixed + tokens * per_token for fixed, per_token in peaks(shape, setup, tier))
