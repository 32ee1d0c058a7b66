"""Attention over packs of prefix-shared pairs, behind transformers' attention interface.

A pair lies in the row as `[prompt | chosen | rejected]`; the rejected answer must see the prompt and itself, not the
chosen answer. That is plain causal attention over two segments a pair:

    queries [prompt | chosen]  on keys [prompt | chosen]
    queries [rejected]         on keys [prompt | rejected]   (gathered; masks aligned at the bottom right)

`shared_prefix_attention_plain` is the definition, with the whole (T, T) mask. On a GPU in half precision all segments
are one call of a variable-length kernel (`attention_kernels.py`); on a CPU in fp32 or wider they attend in blocks of
rows (`row_blocks.py`). Else each is one SDPA call, or, on any device, a plain softmax where a model caps its scores or
has sinks and no kernel takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorafocal.errors import InputError
from lorafocal.ops.attention_kernels import (
    HALF,
    ROW_BLOCKS,
    Kernel,
    KernelChoice,
    Needs,
    a_call_a_segment,
    autograd_anywhere,
    choose,
)
from lorafocal.ops.plain_attention import softmax_attention
from lorafocal.ops.row_blocks import row_block_attention
from lorafocal.ops.segments import PairSpan, Segments, segments_of, visible

SHARED_PREFIX_ATTENTION = "lorafocal_shared_prefix"


def shared_prefix_attention_plain(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D)
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:
    """The definition: softmax over the visible keys, (1, H, T, D)."""
    seen = visible(segments.spans, window, query.device)
    return softmax_attention(query, key, value, seen, scaling=scaling, softcap=softcap, sinks=sinks)


def sdpa_shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same with one SDPA call a segment, or one softmax where SDPA would drop a cap or sinks."""
    groups = query.shape[1] // key.shape[1]
    written_out = softcap is not None or sinks is not None

    def attend(q: Tensor, k: Tensor, v: Tensor, span: PairSpan | None = None) -> Tensor:
        """Rows first, (1, Q, H, D): pieces are then joined row by row, as the model wants them."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if written_out:
            seen = segments.mask(q.shape[2], k.shape[2], window, q.device, span)
            return softmax_attention(q, k, v, seen, scaling=scaling, softcap=softcap, sinks=sinks).transpose(1, 2)
        causal = span is None and q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
        mask = None if causal else segments.mask(q.shape[2], k.shape[2], window, q.device, span)
        together = groups > 1 and _takes_groups(q, v, mask)
        if groups > 1 and not together:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=together)
        return out.transpose(1, 2)

    # Split once: the backward of a slice is a zero tensor of the whole row, one a slice.
    lengths = [length for span in segments.spans for length in span.pieces]
    pieces = zip(*(tensor.transpose(1, 2).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for span in segments.spans:
        q, k, v = next(pieces)
        outputs.append(attend(q, k, v, span if span.is_short else None))
        if len(span.pieces) == 2:
            rejected, keys, values = next(pieces)
            keys, values = (torch.cat((x[:, : span.prompt], y), dim=1) for x, y in ((k, keys), (v, values)))
            outputs.append(attend(rejected, keys, values))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _takes_groups(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA shares keys among heads: on CUDA its flash kernel alone does, in 16 bits, without a mask, heads of
    one width up to 256; else it would write out and keep all scores."""
    one_width = query.shape[-1] == value.shape[-1] <= 256
    return not query.is_cuda or (mask is None and query.dtype in HALF and one_width)


def varlen_shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    kernel: Kernel,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same with one call of a variable-length kernel, which must take what is asked for."""
    out = kernel(
        query[0].transpose(0, 1),  # (T, H, D)
        _GatheredKeys.apply(key[0].transpose(0, 1), segments),  # (K, H_kv, D)
        _GatheredKeys.apply(value[0].transpose(0, 1), segments),
        segments.query_bounds,
        segments.key_bounds,
        segments.longest_query,
        segments.longest_key,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    return out.transpose(0, 1)[None]


class _GatheredKeys(torch.autograd.Function):
    """Keys (or values), segment after segment. Backward, a row is taken once from each of the one or two places it
    went to: no atomic additions, so the same bits every time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return rows.index_select(0, segments.key_index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        segments: Segments = ctx.segments
        to_rows = upstream[0].index_select(0, segments.first_place)
        to_rows[segments.shared_rows] += upstream[0].index_select(0, segments.second_place)
        return to_rows, None


def attend(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D_v)
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The fastest exact attention there is for these tensors, (1, H, T, D_v)."""
    if window is not None and window >= segments.longest_key:
        window = None
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap, "sinks": sinks}
    choice = choice_for(query, value, window=window, softcap=softcap, sinks=sinks)
    if choice == ROW_BLOCKS:
        return row_block_attention(query, key, value, segments, scaling=scaling, window=window)
    if choice.function is None:
        return sdpa_shared_prefix_attention(query, key, value, segments, **options)
    return varlen_shared_prefix_attention(query, key, value, segments, kernel=choice.function, **options)


def choice_for(
    query: Tensor, value: Tensor, *, window: int | None, softcap: float | None, sinks: Tensor | None
) -> KernelChoice:
    """What attends to tensors like these; no kernel has a gradient of sinks, or takes values of another width than the
    keys."""
    needs = Needs(window is not None, softcap is not None, sinks is not None)
    if sinks is not None and sinks.requires_grad:
        return a_call_a_segment(needs, "sinks are trained")
    choice = choose(
        query.device, query.dtype, window=window, softcap=softcap, sinks=needs.sinks, head_dim=query.shape[-1]
    )
    if choice.function is not None and query.shape[-1] != value.shape[-1]:
        return a_call_a_segment(needs, f"keys have {query.shape[-1]} dimensions, values {value.shape[-1]}")
    return choice


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The registered attention function: (1, H, T, D) queries to (1, T, H, D) outputs.

    Compiled layers give the bounds as the tensor of `segments.roles`.
    Raises InputError where a pack's bounds did not arrive or the model asks for something this attention has not.
    """
    if segments is None:
        raise InputError(
            f"{type(module).__name__} was called without `segments`, the bounds of a pack: score through"
            " `lorafocal.policy`, generate inside its `plain_attention`, or set `packing.layout: padded`"
        )
    for asked, what in ((dropout or None, "has attention dropout"), (attention_mask, "makes a mask of its own")):
        if asked is not None:
            raise InputError(f"{type(module).__name__} {what}, which packs do not support")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and s_aux is None:  # as SDPA itself does; what is written out stays in fp32
        query, key, value = _autocast(query, key, value)
    if isinstance(segments, Tensor):
        return packed_attention(query, key, value, segments, s_aux, scaling, sliding_window, softcap), None
    output = attend(query, key, value, segments, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


# One opaque operator for compiled layers: whatever the pack, the graph around it is the same (row F16 of the
# feasibility table). Its backward attends again, which is cheap beside the layer's matrix products.


@torch.library.custom_op(
    "lorafocal::packed_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor roles, Tensor? sinks, float scaling, SymInt? window,"
    " float? softcap) -> Tensor",
)
def packed_attention(  # type: ignore[no-untyped-def]
    query, key, value, roles, sinks, scaling, window, softcap
):
    """`attend` with the bounds as `segments.roles` tells them; (1, T, H, D_v)."""
    segments = segments_of(roles, query.device)
    out = attend(query, key, value, segments, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2).contiguous()


@packed_attention.register_fake
def _(query, key, value, roles, sinks, scaling, window, softcap):  # type: ignore[no-untyped-def]
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


@torch.library.custom_op(
    "lorafocal::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor roles, Tensor? sinks, float scaling,"
    " SymInt? window, float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _packed_attention_backward(  # type: ignore[no-untyped-def]
    upstream, query, key, value, roles, sinks, scaling, window, softcap
):
    with autograd_anywhere(), torch.autocast(query.device.type, enabled=False):
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        sinks = None if sinks is None else sinks.detach().requires_grad_()
        segments = segments_of(roles, query.device)
        out = attend(q, k, v, segments, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
        leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
        gradients = torch.autograd.grad(out.transpose(1, 2), leaves, upstream)
    to_sinks = query.new_empty(0) if sinks is None else gradients[3]
    return *(gradient.contiguous() for gradient in gradients[:3]), to_sinks


@_packed_attention_backward.register_fake
def _(upstream, query, key, value, roles, sinks, scaling, window, softcap):  # type: ignore[no-untyped-def]
    to_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    contiguous = torch.contiguous_format
    return *(torch.empty_like(tensor, memory_format=contiguous) for tensor in (query, key, value)), to_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    query, key, value, to_sinks = _packed_attention_backward(upstream, *ctx.saved_tensors, *ctx.options)
    has_sinks = ctx.saved_tensors[4] is not None
    return query, key, value, None, to_sinks if has_sinks else None, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save)


# Packs carry their own bounds. Without a mask function of this name transformers builds no mask, and does not look at
# the positions for packed sequences either, which would have the host wait for the device once a forward.
AttentionInterface.register(SHARED_PREFIX_ATTENTION, shared_prefix_attention)
