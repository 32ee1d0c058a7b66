"""Attention of one segment, written out: what every kernel is measured by."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) boolean: the last query sees the last key; `window` counts the keys seen, itself included."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def softmax_attention(
    query: Tensor,  # (1, H, Q, D)
    key: Tensor,  # (1, H_kv, K, D)
    value: Tensor,  # (1, H_kv, K, D_v)
    seen: Tensor,  # (Q, K) boolean
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:
    """Softmax over the keys seen, in fp32 or wider, to the input's dtype: (1, H, Q, D_v).

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
