"""Per-token log-probabilities from hidden states, without keeping an (N, V) tensor.

`token_logps_plain` is the definition. `token_logps` equals it and works in row chunks. With a frozen head the
gradient of a row does not depend on the loss: d logp / d hidden = (onehot(label) - softmax) W, so it is computed in
the forward, kept in the hidden dtype, and only scaled in the backward: two matrix products, no recompute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26  # entries of the largest logits chunk: 256 MiB in fp32


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits after the head: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative with respect to the raw logits, from the transformed ones."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap).square())


def token_logps_plain(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """Log-probability of each label in nats, (N,), fp32 or wider: the definition."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return log_softmax(transform(logits), dim=-1).gather(-1, labels[:, None]).squeeze(-1)


def token_logps(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = LogitTransform(),
    *,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """`token_logps_plain` in row chunks, with gradients only for the inputs that require them.

    At most one (rows_per_chunk, V) tensor of logits is alive at a time, in forward and backward.
    """
    rows = rows_per_chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains_head and torch.is_grad_enabled():
        return _recomputed(hidden, weight, labels, bias, transform, rows)
    result: Tensor = _FrozenHeadLogps.apply(hidden, weight, labels, bias, transform, rows)
    return result


def _recomputed(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform, rows: int
) -> Tensor:
    """The definition chunk by chunk, each recomputed in the backward: for a head that is trained."""
    chunks = [
        checkpoint(token_logps_plain, h, weight, y, bias, transform, use_reentrant=False)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(chunks)


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probs under a frozen head, the gradient towards the hidden states computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, rows):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide_weight = weight if _has_wide_product(weight) else weight.to(wide)
        for start in range(0, hidden.shape[0], rows):
            at = slice(start, start + rows)
            logits = _wide_product(hidden[at], wide_weight, wide)
            if bias is not None:
                logits += bias
            logits = transform(logits)
            slope = transform.slope(logits) if gradient is not None else 1.0
            picked = logits.gather(-1, labels[at, None])
            top = logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()  # softmax times `total`, in the logits' own memory
            total = weights.sum(-1, keepdim=True)
            logps[at] = (picked - top - total.log()).squeeze(-1)
            if gradient is not None:
                weights.scatter_add_(-1, labels[at, None], -total)  # -total times (onehot - softmax)
                if isinstance(slope, Tensor):
                    weights, slope = weights.mul_(slope), 1.0
                gradient[at] = (weights.to(wide_weight.dtype) @ wide_weight) * (slope / -total)
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)
        return scaled, None, None, None, None, None


def _has_wide_product(weight: Tensor) -> bool:
    """Whether this device multiplies low-precision matrices into fp32 output without widening the inputs."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _wide_product(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """hidden @ weight.T with a result of dtype `wide`."""
    if _has_wide_product(weight):
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=wide)
    return hidden.to(wide) @ weight.T


class LogProbHead(nn.Linear):
    """An output head that, given labels, returns per-token log-probs instead of logits.

    Made from a model's own `nn.Linear` by exchanging its class, so weights, ties and saved files stay as they are,
    and engines that hook modules (DDP, ZeRO, FSDP) see an ordinary call. Without labels it is the plain head.
    """

    transform: LogitTransform
    labels: Tensor | None
    rows: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V) without labels; (1, N) log-probs in nats with them, fp32 or wider."""
        if self.labels is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.rows is not None:
            flat = flat[self.rows]
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 sums would be off by 0.04 nats a token
            return token_logps(flat, self.weight, self.labels, self.bias, self.transform)[None]
