"""Per-token log-probabilities from hidden states, without keeping an (N, V) tensor.

`token_logps_plain` is the definition. `token_logps` equals it and works in row chunks. With a frozen head the
gradient of a row does not depend on the loss: d logp / d hidden = (onehot(label) - softmax) W, so it is computed in
the forward, kept in the hidden dtype, and only scaled in the backward: two matrix products, no recompute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

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
    head = _TrainedHeadLogps if trains_head and torch.is_grad_enabled() else _FrozenHeadLogps
    result: Tensor = head.apply(hidden, weight, labels, bias, transform, rows)
    return result


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probs under a frozen head, the gradient towards the hidden states computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, rows):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide_weight = weight if _has_wide_product(weight) else weight.to(wide)
        for at in _chunks(hidden, rows):
            chunk = _Chunk.of(hidden[at], wide_weight, labels[at], bias, transform, slope=gradient is not None)
            logps[at] = chunk.logps
            if gradient is not None:
                gradient[at] = chunk.error().to(wide_weight.dtype) @ wide_weight * chunk.factor
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)
        return scaled, None, None, None, None, None


class _TrainedHeadLogps(torch.autograd.Function):
    """The same log-probs, to the last bit, under a head that is trained: its logits are computed again backwards."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.transform, ctx.rows = transform, rows
        with torch.no_grad():
            return _FrozenHeadLogps.apply(hidden.detach(), weight.detach(), labels, bias, transform, rows)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, labels, bias = ctx.saved_tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wide_weight = weight if _has_wide_product(weight) else weight.to(wide)
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for at in _chunks(hidden, ctx.rows):
            chunk = _Chunk.of(hidden[at], wide_weight, labels[at], bias, ctx.transform, slope=True)
            error = chunk.error() * (chunk.factor * upstream[at, None])
            if to_bias is not None:
                to_bias += error.sum(0)
            error = error.to(wide_weight.dtype)
            to_hidden[at] = error @ wide_weight
            to_weight += _wide_product(error.T, hidden[at].T.to(error.dtype), wide)
        return (
            to_hidden,
            to_weight.to(weight.dtype),
            None,
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


def _chunks(hidden: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, hidden.shape[0], rows))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Log-probs of some rows, and what their gradient towards the logits is made of."""

    logps: Tensor  # (n,)
    labels: Tensor  # (n,)
    weights: Tensor  # (n, V), softmax times `total`
    total: Tensor  # (n, 1)
    slope: Tensor | float  # of the logits' transform

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        *,
        slope: bool,
    ) -> _Chunk:
        logits = _wide_product(hidden, weight, torch.promote_types(hidden.dtype, torch.float32))
        if bias is not None:
            logits += bias
        logits = transform(logits)
        slopes = transform.slope(logits) if slope else 1.0
        picked = logits.gather(-1, labels[:, None])
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()  # in the logits' own memory
        total = weights.sum(-1, keepdim=True)
        return cls((picked - top - total.log()).squeeze(-1), labels, weights, total, slopes)

    def error(self) -> Tensor:
        """(onehot - softmax) * slope, (n, V), still to be multiplied by `factor`; overwrites `weights`."""
        error = self.weights.scatter_add_(-1, self.labels[:, None], -self.total)
        return error.mul_(self.slope) if isinstance(self.slope, Tensor) else error

    @property
    def factor(self) -> Tensor:
        """(n, 1)"""
        return (1.0 if isinstance(self.slope, Tensor) else self.slope) / -self.total


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
