"""Per-token log-probabilities from hidden states, without keeping an (N, V) tensor.

`token_logps_plain` is the definition. `token_logps` equals it and works in row chunks: a matrix product, a fold
(`head_fold_`, or a kernel of the same signature) and, where a gradient is wanted, a second product. With a frozen head
the gradient of a row does not depend on the loss: d logp / d hidden = (onehot(label) - softmax) W, so it is computed
in the forward, kept in the hidden dtype, and only scaled in the backward: two matrix products, no recompute. On a CPU
a frozen head's chunk of rows is done a tile of the vocabulary at a time, by `tiled_head`.

Where asked, the fold also fills in each row's collision: log sum_v softmax_v^2, of two draws being the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from lorafocal.memory import HEAD_CHUNK_ELEMENTS as CHUNK_ELEMENTS
from lorafocal.memory import ROW_TILE
from lorafocal.ops.autograd import first_order
from lorafocal.ops.tiled_head import ROWS as TILE_ROWS
from lorafocal.ops.tiled_head import WIDTH as TILE_WIDTH
from lorafocal.ops.tiled_head import TiledHead

if TYPE_CHECKING:
    from lorafocal.ops.elementwise import Elementwise


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits after the head: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def in_place_(self, logits: Tensor, *, slope: bool) -> Tensor | None:
        """Overwrite `logits` with their transform; returns its derivative over `scale` where asked and not 1."""
        if self.softcap is None:
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return None
        capped = logits.mul_(self.scale / self.softcap).tanh_()
        derivative = torch.addcmul(capped.new_ones(()), capped, capped, value=-1) if slope else None
        capped.mul_(self.softcap)
        return derivative


class Fold(NamedTuple):
    """Log-probs of some rows, and their gradients towards the raw logits: factor * error."""

    logps: Tensor  # (n,) nats
    error: Tensor | None  # (n, V)
    factor: Tensor | float  # (n, 1)


def head_fold_(
    logits: Tensor,  # (n, V) as the head makes them, fp32 or wider
    labels: Tensor,  # (n,) int64
    dtype: torch.dtype | None,
    transform: LogitTransform = LogitTransform(),
    collisions: Tensor | None = None,  # (n,)
) -> Fold:
    """Log-probs of the labels and, in `dtype`, the gradient of each; no gradient where `dtype` is None.

    factor * error = (onehot(label) - softmax) * d transformed / d logits: whatever is one number a row may stay in
    the factor, which is applied after the product with the head's weight. Overwrites `logits`, and `collisions` with
    log sum_v softmax_v^2, nats.
    """
    slope = transform.in_place_(logits, slope=dtype is not None)
    picked = logits.gather(-1, labels[:, None])
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()  # softmax * total
    total = weights.sum(-1, keepdim=True)
    logps = (picked - top - total.log()).squeeze(-1)
    if collisions is not None:
        collisions.copy_(2 * (weights.norm(dim=-1).log() - total.squeeze(-1).log()))
    if dtype is None:
        return Fold(logps, None, 1.0)
    error = weights.scatter_add_(-1, labels[:, None], -total)
    if slope is not None:
        error.mul_(slope)
    return Fold(logps, error.to(dtype), transform.scale / -total)


HeadFold = Callable[..., Fold]
"""`head_fold_`, or a kernel of its signature."""


def token_logps_plain(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """Log-probability of each label in nats, (N,), fp32 or wider: the definition."""
    return all_logps(hidden, weight, bias, transform).gather(-1, labels[:, None]).squeeze(-1)


def token_collisions_plain(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """log sum_v softmax_v^2 of each row in nats, (N,), fp32 or wider: the definition."""
    return torch.logsumexp(2 * all_logps(hidden, weight, bias, transform), dim=-1)


def all_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Log-probs of the whole vocabulary, (N, V): for definitions alone."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = linear(hidden.to(wide), rounded_as(weight, hidden).to(wide), None if bias is None else bias.to(wide))
    return log_softmax(transform(logits), dim=-1)


def rounded_as(weight: Tensor, hidden: Tensor) -> Tensor:
    """A weight as rows of `hidden` are multiplied by it: an fp32 master is rounded to theirs, nothing is widened."""
    wider = torch.finfo(weight.dtype).bits > torch.finfo(hidden.dtype).bits
    return weight.to(hidden.dtype) if wider else weight


def token_logps(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = LogitTransform(),
    *,
    rows_per_chunk: int | None = None,
    fold: HeadFold = head_fold_,
    collisions: Tensor | None = None,  # (N,)
) -> Tensor:
    """`token_logps_plain` in row chunks, with gradients only for the inputs that require them.

    `collisions` is overwritten with `token_collisions_plain`, which is never differentiated.

    At most one (rows_per_chunk, V) tensor of logits is alive at a time, in forward and backward, and where the fold
    makes them its error in the weight's dtype and a soft-cap's slope; on a CPU, under a frozen head, one tile of no
    more elements. Products are accumulated in fp32 or wider.
    """
    rows = rows_per_chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    head = _TrainedHeadLogps if trains_head and torch.is_grad_enabled() else _FrozenHeadLogps
    result: Tensor = head.apply(hidden, weight, labels, bias, transform, rows, fold, collisions)
    return result


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probs under a frozen head, the gradient towards the hidden states computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, rows, fold, collisions):  # type: ignore[no-untyped-def]
        head: Head | TiledHead
        if takes_tiles(hidden, fold):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            head = TiledHead(rounded_as(weight, hidden), bias, transform, wide)
            rows = min(TILE_ROWS, max(rows, rows * len(weight) // TILE_WIDTH))
        else:
            head = Head.of(hidden, weight, bias, transform, fold)
        logps = torch.empty(hidden.shape[0], dtype=head.wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in chunks(hidden, rows):
            beside = None if collisions is None else collisions[at]
            logps[at], to_hidden = head.score(hidden[at], labels[at], beside, differentiated=gradient is not None)
            if gradient is not None and to_hidden is not None:
                gradient[at] = to_hidden
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)
        return scaled, None, None, None, None, None, None, None


def takes_tiles(hidden: Tensor, fold: HeadFold) -> bool:
    """Whether a frozen head's logits come in tiles of the vocabulary: on a CPU, where no other fold was asked for."""
    return hidden.device.type == "cpu" and fold is head_fold_


class _TrainedHeadLogps(torch.autograd.Function):
    """The same log-probs, to the last bit, under a head that is trained: its logits are computed again backwards."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, *how):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.transform, ctx.rows, ctx.fold, _ = how
        with torch.no_grad():
            return _FrozenHeadLogps.apply(hidden.detach(), weight.detach(), labels, bias, *how)

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, labels, bias = ctx.saved_tensors
        head = Head.of(hidden, weight, bias, ctx.transform, ctx.fold)
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=head.wide)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=head.wide)
        for at in chunks(hidden, ctx.rows):
            to_hidden[at] = head.differentiate(hidden[at], labels[at], upstream[at, None], to_weight, to_bias)
        to_narrow_bias = None if to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, to_weight.to(weight.dtype), None, to_narrow_bias, None, None, None, None


def chunks(hidden: Tensor, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` rows, as even as whole tiles of rows make them.

    A last chunk of few rows, or chunks of a few rows more than tiles, would be slow products.
    """
    total, tile = hidden.shape[0], ROW_TILE if rows >= ROW_TILE else 1
    number = max(1, -(-total // (rows // tile * tile)))
    size = -(-total // (number * tile)) * tile
    return (slice(start, min(start + size, total)) for start in range(0, total, size or 1))


@dataclass(frozen=True, slots=True)
class Head:
    """The head as it is multiplied by, one chunk of rows at a time; what a chunk needs dies with the call."""

    weight: Tensor  # (V, D), wide where this device cannot multiply narrow matrices into a wide result
    bias: Tensor | None
    transform: LogitTransform
    fold: HeadFold
    wide: torch.dtype  # of sums and log-probs

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        fold: HeadFold = head_fold_,
    ) -> Head:
        """The head for rows like `hidden`."""
        wide, weight = torch.promote_types(hidden.dtype, torch.float32), rounded_as(weight, hidden)
        return cls(weight if _multiplies_into_wide(weight) else weight.to(wide), bias, transform, fold, wide)

    def score(
        self, hidden: Tensor, labels: Tensor, collisions: Tensor | None, *, differentiated: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (n,) and, where asked, their gradients towards the hidden rows, (n, D); fills in `collisions`."""
        dtype = self.weight.dtype if differentiated else None
        logps, error, factor = self._folded(hidden, labels, dtype, collisions)
        return logps, None if error is None else self._product(error, self.weight) * factor

    def differentiate(
        self, hidden: Tensor, labels: Tensor, upstream: Tensor, to_weight: Tensor, to_bias: Tensor | None
    ) -> Tensor:
        """Gradient towards the hidden rows (n, D); those towards weight and bias are added to what is given."""
        _, error, factor = self._folded(hidden, labels, self.weight.dtype, None)
        assert error is not None  # a dtype was asked for
        scale = factor * upstream
        add_product_(to_weight, error.T, hidden * scale)
        if to_bias is not None:
            add_product_(to_bias[:, None], error.T, scale)
        return self._product(error, self.weight) * scale

    def _folded(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype | None, collisions: Tensor | None) -> Fold:
        return self.fold(self.logits(hidden), labels, dtype, self.transform, collisions)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) in `wide`, before the transform."""
        logits = self._product(hidden, self.weight.T)
        if self.bias is not None:
            logits += self.bias
        return logits

    def to_rows(self, error: Tensor) -> Tensor:
        """Gradient towards hidden rows, (n, D), from one towards the logits but for the transform's scale, (n, V)."""
        return self._product(error.to(self.weight.dtype), self.weight) * self.transform.scale

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """rows @ matrix, accumulated and returned in `wide`."""
        if _multiplies_into_wide(matrix):
            return torch.mm(rows.to(matrix.dtype), matrix, out_dtype=self.wide)
        return rows.to(self.wide) @ matrix


_ADDS_INTO_WIDE = Version(torch.__version__) >= Version("2.10")  # before, what is added to had to be narrow too


def _multiplies_into_wide(weight: Tensor) -> bool:
    """Whether this device multiplies low-precision matrices into fp32 output without widening the inputs."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in total's dtype; before torch 2.10 with a second tensor of its size."""
    if _multiplies_into_wide(left) and not _ADDS_INTO_WIDE:
        total += torch.mm(left, right.to(left.dtype), out_dtype=total.dtype)
    elif _multiplies_into_wide(left):
        torch.addmm(total, left, right.to(left.dtype), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left, right.to(left.dtype))


OfRows = Callable[[Tensor, Tensor, Tensor, Tensor | None, LogitTransform, int | None], Tensor]
"""(N, ...) of hidden rows (N, D), the head's weight (V, D), labels (N,), bias (V,) or None, transform, rows a chunk."""


class LogProbHead(nn.Linear):
    """An output head that, given labels, returns per-token log-probs instead of logits, and fills in `collisions`.

    Where there is one, `by` says what it returns of these rows instead.
    Made from a model's own `nn.Linear` by exchanging its class, so weights, ties and saved files stay as they are,
    and engines that hook modules (DDP, ZeRO, FSDP) see an ordinary call. Without labels it is the plain head.
    """

    transform: LogitTransform
    labels: Tensor | None
    rows: Tensor | None
    collisions: Tensor | None = None  # (N,)
    by: OfRows | None = None
    fold: HeadFold = staticmethod(head_fold_)
    rows_per_chunk: int | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V) without labels; (1, N) log-probs in nats with them, fp32 or wider."""
        if self.labels is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.rows is not None:
            flat = flat[self.rows]
        if torch.is_autocast_enabled(hidden.device.type) and self.weight.dtype == torch.float32:  # masters: bf16 rows
            flat = flat.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 sums would be off by 0.04 nats a token
            given = flat, self.weight, self.labels, self.bias, self.transform
            if self.by is not None:
                return self.by(*given, self.rows_per_chunk)[None]
            asked: dict[str, Any] = {"fold": self.fold, "collisions": self.collisions}
            return token_logps(*given, rows_per_chunk=self.rows_per_chunk, **asked)[None]


def set_heads(model: nn.Module, elementwise: Elementwise, rows_per_chunk: int | None = None) -> None:
    """Let every `LogProbHead` of `model` fold its logits with the chosen set of functions, so many rows at a time."""
    for module in model.modules():
        if isinstance(module, LogProbHead):
            module.fold, module.rows_per_chunk = elementwise.head_fold_, rows_per_chunk
