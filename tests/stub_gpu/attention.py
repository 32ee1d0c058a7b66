"""Attention kernels that CPUs do not have, written out in float64; names and arguments are torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]


def attention(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H_kv, K, D)
    value: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Sequence[int] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """Outputs and the log of the softmax's sums; masks are aligned at the bottom right, empty rows are 0."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    length, keys = scores.shape[-2:]
    row, column = torch.arange(length)[:, None] + keys - length, torch.arange(keys)
    left, right = window[0], 0 if causal else window[1]
    hidden = ((left >= 0) & (column < row - left)) | ((right >= 0) & (column > row + right))
    scores = scores.masked_fill(hidden, float("-inf"))
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1).nan_to_num() @ value, scores.logsumexp(-1)


def gradients(attend: Callable[..., Tensor], inputs: Part, upstream: Tensor) -> tuple[Tensor, ...]:
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.inference_mode(False), torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        leaves = [x.detach().double().requires_grad_() for x in inputs]
        found = torch.autograd.grad(attend(*leaves), leaves, upstream.double())
    return tuple(gradient.to(x.dtype) for gradient, x in zip(found, inputs, strict=True))


# ---- segments of one row, (T, H, D)


def segments(part: Part, bounds: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    places = [list(zip(of.tolist(), of.tolist()[1:], strict=False)) for of in bounds]
    found = []
    for (start, stop), (first, last) in zip(*places, strict=True):
        rows = (part[0][start:stop], part[1][first:last], part[2][first:last])
        found.append(attention(*(x.transpose(0, 1)[None] for x in rows), **options))
    return torch.cat([out[0].transpose(0, 1) for out, _ in found]), torch.cat([sums[0] for _, sums in found], -1)


def varlen(q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor, *rest: Any, **named: Any) -> tuple[Any, ...]:
    """`torch_attn::_varlen_attn`: the longest lengths, then causal, scale and window."""
    options = _options(rest[2:], named)
    out, sums = segments((q, k, v), (at_q, at_k), **options)
    return out.to(q.dtype), sums.float(), None


def varlen_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, at_q: Tensor, at_k: Tensor,
    *rest: Any, **named: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = _options((rest[2], *rest[4:]), named)
    return gradients(lambda *part: segments(part, (at_q, at_k), **options)[0], (q, k, v), upstream)


def _options(positional: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    given = dict(zip(("is_causal", "scale", "window_size"), positional, strict=False)) | named
    window = given.get("window_size") or (-1, -1)
    return {"causal": bool(given.get("is_causal")), "scale": given.get("scale"), "window": window}


# ---- whole batches, (B, H, T, D)


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0, causal: bool = False, debug: bool = False, *, scale: Any = None
) -> tuple[Any, ...]:
    out, sums = attention(q, k, v, causal=causal, scale=scale)
    return out.to(q.dtype), sums.float(), *[None] * 7


def flash_backward(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: Any = None) -> tuple[Any, ...]:
    """Rest: output, sums, bounds, lengths, dropout, causal, seed, offset."""
    return gradients(lambda *part: attention(*part, causal=rest[7], scale=scale)[0], (q, k, v), upstream)


def efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sums: bool, dropout: float = 0, causal: bool = False, *,
    scale: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    return attention(q, k, v, bias, causal=causal, scale=scale)[0].to(q.dtype), None, None, None


def efficient_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any, scale: Any = None
) -> tuple[Any, ...]:
    """Rest: output, sums, seed, offset, dropout, which gradients, causal."""
    options = {"causal": rest[6] if len(rest) > 6 else False, "scale": scale}
    return *gradients(lambda q, k, v: attention(q, k, v, bias, **options)[0], (q, k, v), upstream), None


_SDPA = "_scaled_dot_product_"
OF_ATTENTION: dict[str, Callable[..., Any]] = {
    "_varlen_attn": varlen,
    "_varlen_attn_backward": varlen_backward,
    f"{_SDPA}flash_attention": flash,
    f"{_SDPA}flash_attention_backward": flash_backward,
    f"{_SDPA}efficient_attention": efficient,
    f"{_SDPA}efficient_attention_backward": efficient_backward,
}
