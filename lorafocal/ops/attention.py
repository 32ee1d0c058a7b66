"""Attention over packs of prefix-shared pairs, behind transformers' attention interface.

A pair lies in the row as `[prompt | chosen | rejected]`; the rejected answer must see the prompt and itself, not the
chosen answer. That is plain causal attention over two segments a pair:

    queries [prompt | chosen]  on keys [prompt | chosen]
    queries [rejected]         on keys [prompt | rejected]   (gathered; masks aligned at the bottom right)

`shared_prefix_attention_plain` is the definition, with the whole (T, T) mask. On a CPU, and in fp32, each segment is
one SDPA call (a plain softmax where a model caps its scores or has sinks, which SDPA knows nothing of); on a GPU in
half precision all of them are one variable-length FlashAttention call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from lorafocal.errors import InputError

SHARED_PREFIX_ATTENTION = "lorafocal_shared_prefix"


@dataclass(frozen=True, slots=True)
class PairSpan:
    """Where one pair lies in its row, in tokens."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def answers(self) -> int:
        """First row of the rejected answer."""
        return self.start + self.prompt + self.chosen

    @property
    def stop(self) -> int:
        return self.answers + self.rejected


@dataclass(frozen=True, slots=True)
class Segments:
    """Attention bounds of a pack of B pairs in a row of T tokens: built once a pack, from host integers.

    One opaque object, so that wrappers which walk a model's arguments leave it alone.
    """

    spans: tuple[PairSpan, ...]
    key_index: Tensor  # (K,) int64: rows of the keys, segment after segment
    query_bounds: Tensor  # (S + 1,) int32: cumulative query lengths of the S segments, two a pair
    key_bounds: Tensor  # (S + 1,) int32: cumulative key lengths
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, spans: tuple[PairSpan, ...]) -> Segments:
        keys: list[int] = []
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        for span in spans:
            keys += range(span.start, span.answers)
            query_lengths.append(span.prompt + span.chosen)
            key_lengths.append(span.prompt + span.chosen)
            if span.rejected:  # a lone answer has no second segment
                keys += range(span.start, span.start + span.prompt)
                keys += range(span.answers, span.stop)
                query_lengths.append(span.rejected)
                key_lengths.append(span.prompt + span.rejected)
        return cls(
            spans,
            torch.tensor(keys, dtype=torch.int64),
            _cumulative(query_lengths),
            _cumulative(key_lengths),
            max(query_lengths),
            max(key_lengths),
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Segments:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            key_index=move(self.key_index),
            query_bounds=move(self.query_bounds),
            key_bounds=move(self.key_bounds),
        )


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) boolean: the last query sees the last key; `window` counts the keys seen, itself included."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def visible(spans: tuple[PairSpan, ...], window: int | None, device: torch.device) -> Tensor:
    """(T, T) boolean: which row sees which."""
    mask = torch.zeros(spans[-1].stop, spans[-1].stop, dtype=torch.bool, device=device)
    for span in spans:
        first = slice(span.start, span.answers)
        mask[first, first] = causal_mask(span.prompt + span.chosen, span.prompt + span.chosen, window, device)
        rejected = causal_mask(span.rejected, span.prompt + span.rejected, window, device)
        mask[span.answers : span.stop, span.start : span.start + span.prompt] = rejected[:, : span.prompt]
        mask[span.answers : span.stop, span.answers : span.stop] = rejected[:, span.prompt :]
    return mask


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
    return _softmax_attention(query, key, value, seen, scaling=scaling, softcap=softcap, sinks=sinks)


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, in fp32 or wider, to the input's dtype.

    `softcap` bends scores before they are masked (Gemma-2); a head's sink is a score without a value, which takes its
    share of the weight (gpt-oss).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(groups, 1) for tensor in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(wide) @ keys.transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., : seen.shape[-1]]
        return (weights @ values).to(query.dtype)


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
    grouped = query.shape[1] != key.shape[1]
    outputs = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
        if softcap is not None or sinks is not None:
            seen = causal_mask(q.shape[2], k.shape[2], window, q.device)
            outputs.append(_softmax_attention(q, k, v, seen, scaling=scaling, softcap=softcap, sinks=sinks))
            return
        square = q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
        mask = None if square else causal_mask(q.shape[2], k.shape[2], window, q.device)
        outputs.append(
            scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scaling, enable_gqa=grouped)
        )

    # Split once: the backward of a slice is a zero tensor of the whole row, one a slice.
    lengths = [length for span in segments.spans for length in (span.prompt + span.chosen, span.rejected)]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    for number, span in enumerate(segments.spans):
        first, rejected = 2 * number, 2 * number + 1
        attend(queries[first], keys[first], values[first])
        if span.rejected:
            attend(
                queries[rejected],
                torch.cat((keys[first][:, :, : span.prompt], keys[rejected]), dim=2),
                torch.cat((values[first][:, :, : span.prompt], values[rejected]), dim=2),
            )
    return torch.cat(outputs, dim=2)


def varlen_shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The same with one variable-length FlashAttention call; `kernel` has the signature of torch's `varlen_attn`.

    Raises InputError for a soft-cap or sinks, which that kernel has not.
    """
    for name, asked in (("soft-capped scores", softcap), ("attention sinks", sinks)):
        if asked is not None:
            raise InputError(f"the model has {name}, which packs on a GPU do not support")
    kernel = kernel or _torch_varlen_kernel()
    accepted = _parameters(kernel)
    options: dict[str, object] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "window_size" not in accepted:
        if window is not None and window < segments.longest_key:
            raise InputError(
                "sliding-window attention needs a variable-length kernel with `window_size`, which this torch lacks;"
                " upgrade torch or set `packing.layout: padded`"
            )
        options = {"is_causal": True}
    q = query[0].transpose(0, 1)  # (T, H, D)
    k = key[0].transpose(0, 1).index_select(0, segments.key_index)  # (K, H_kv, D)
    v = value[0].transpose(0, 1).index_select(0, segments.key_index)
    if "scale" in accepted:
        options["scale"] = scaling
    else:
        q = q * (scaling * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = kernel(
        q,
        k,
        v,
        segments.query_bounds,
        segments.key_bounds,
        segments.longest_query,
        segments.longest_key,
        **options,
    )
    return out.transpose(0, 1)[None]


def _torch_varlen_kernel() -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise InputError(
            "packed training on a GPU needs torch.nn.attention.varlen (torch >= 2.10);"
            " upgrade torch or set `packing.layout: padded`"
        ) from error
    return varlen_attn  # type: ignore[return-value]  # without `return_aux` it returns the output alone


@cache
def _parameters(kernel: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


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
    segments: Segments | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The registered attention function: (1, H, T, D) queries to (1, T, H, D) outputs.

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
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    attend = varlen_shared_prefix_attention if flash else sdpa_shared_prefix_attention
    output = attend(query, key, value, segments, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2), None


def _no_mask(*_: object, **__: object) -> None:
    """Packs carry their own bounds; no mask tensor is ever built."""


AttentionInterface.register(SHARED_PREFIX_ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX_ATTENTION, _no_mask)
