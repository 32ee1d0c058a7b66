"""KL(reference || policy) at each row, over the whole vocabulary, beside the log-probs, without an (N, V) tensor.

`token_divergences_plain` is the definition. `compare_tokens` equals it in row chunks, as `logps.token_logps` does for
log-probs, and gives the log-probs of both models with it: the reference brings its hidden rows (`ReferenceRows`), and
its logits are made here, a chunk at a time, next to the policy's. The gradient of a row towards the policy's logits is
softmax_policy - softmax_reference. With a frozen head it is computed in the forward, like that of the log-prob: two
tensors of the size of the hidden rows are kept, and the backward only scales them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lorafocal.memory import HEAD_CHUNK_ELEMENTS as CHUNK_ELEMENTS
from lorafocal.ops.autograd import first_order
from lorafocal.ops.logps import Head, LogitTransform, OfRows, add_product_, all_logps, chunks

_PLAIN = LogitTransform()


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """What a reference makes its logits of; never differentiated."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    transform: LogitTransform = _PLAIN

    @property
    def head(self) -> Head:
        """Its head, as it is multiplied by."""
        bias = None if self.bias is None else self.bias.detach()
        return Head.of(self.hidden, self.weight.detach(), bias, self.transform)


class ComparedTokens(NamedTuple):
    """N tokens under policy and reference, nats, fp32 or wider; the first two differentiable towards the policy."""

    logps: Tensor  # (N,) of the labels under the policy
    divergences: Tensor  # (N,) KL(reference || policy)
    reference: Tensor  # (N,) of the labels under the reference


class RowKeeper:
    """Stands in a log-prob head's place (`logps.OfRows`) and keeps what it is called with; the log-probs are zeros."""

    rows: ReferenceRows

    def __init__(self, *, copies: bool) -> None:
        """`copies`: of the head's weights too, which are there during the call alone."""
        self.copies = copies

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        rows_per_chunk: int | None,
    ) -> Tensor:
        if self.copies:
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
        self.rows = ReferenceRows(hidden.detach(), weight, bias, transform)
        return hidden.new_zeros(len(labels))


def against(reference: ReferenceRows) -> OfRows:
    """Stands in a log-prob head's place: (N, 3), the columns of `ComparedTokens`."""
    return lambda hidden, weight, labels, bias, transform, rows: torch.stack(
        compare_tokens(hidden, weight, labels, reference, bias, transform, rows_per_chunk=rows), dim=-1
    )


def token_divergences_plain(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    reference: ReferenceRows,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = _PLAIN,
) -> Tensor:
    """KL(reference || policy) of each row in nats, (N,), fp32 or wider: the definition.

    sum_v reference_v (log reference_v - log policy_v): forward KL, as in TDPO (Zeng et al. 2024, arXiv:2404.11999).
    """
    policy = all_logps(hidden, weight, bias, transform)
    before = all_logps(reference.hidden, reference.weight, reference.bias, reference.transform).detach()
    return (before.exp() * (before - policy)).sum(-1)


def compare_tokens(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    reference: ReferenceRows,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = _PLAIN,
    *,
    rows_per_chunk: int | None = None,
) -> ComparedTokens:
    """`token_divergences_plain` and the log-probs of both models, with gradients only for inputs that require them.

    At most three (rows_per_chunk, V) tensors in fp32 or wider are alive at a time, a fourth with a soft-cap's slope.
    Of rows and heads that are the same to the last bit, both log-probs are the same and the divergence is exactly 0.
    """
    rows = rows_per_chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    head = _TrainedHead if trains_head and torch.is_grad_enabled() else _FrozenHead
    return ComparedTokens(*head.apply(hidden, weight, labels, bias, reference, transform, rows))


class _Chunk(NamedTuple):
    """All log-probs of n rows under both models, (n, V), and the slope of the policy's soft-cap where one is needed."""

    policy: Tensor
    reference: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, head: Head, rows: Tensor, reference: Head, reference_rows: Tensor, *, slope: bool) -> _Chunk:
        before, _ = _all_logps(reference, reference_rows, slope=False)
        policy, derivative = _all_logps(head, rows, slope=slope)
        return cls(policy, before, derivative)


def _all_logps(head: Head, rows: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    logits = head.logits(rows)
    derivative = head.transform.in_place_(logits, slope=slope)
    return log_softmax(logits, dim=-1), derivative


class _FrozenHead(torch.autograd.Function):
    """Under a frozen head: the gradients towards the hidden states, computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, reference, transform, rows):  # type: ignore[no-untyped-def]
        head, theirs = Head.of(hidden, weight, bias, transform), reference.head
        found = hidden.new_empty((3, len(hidden)), dtype=head.wide)
        gradients = [torch.empty_like(hidden) for _ in range(2 * ctx.needs_input_grad[0])]
        for at in chunks(hidden, rows):
            here = _compare(head, hidden[at], theirs, reference.hidden[at], labels[at, None], bool(gradients))
            found[:, at] = torch.stack(here.numbers)
            for whole, of_chunk in zip(gradients, here.to_rows, strict=True):
                whole[at] = of_chunk
        ctx.save_for_backward(*gradients)
        logps, divergences, before = found.unbind()
        ctx.mark_non_differentiable(before)
        return logps, divergences, before

    @staticmethod
    @first_order
    def backward(ctx, to_logps, to_divergences, _):  # type: ignore[no-untyped-def]
        if not ctx.saved_tensors:
            return None, None, None, None, None, None, None
        of_logps, of_divergences = ctx.saved_tensors
        total = (of_logps * to_logps[:, None]).addcmul_(of_divergences, to_divergences[:, None])
        return total.to(of_logps.dtype), None, None, None, None, None, None


class _Here(NamedTuple):
    """What is kept of a chunk."""

    numbers: ComparedTokens  # (n,) each
    to_rows: tuple[Tensor, ...]  # (n, D) gradients of log-probs and divergences, where they are wanted


def _compare(
    head: Head, rows: Tensor, reference: Head, reference_rows: Tensor, labels: Tensor, differentiated: bool
) -> _Here:
    """One chunk; whatever has the size of a vocabulary dies with the call."""
    policy, before, slope = _Chunk.of(head, rows, reference, reference_rows, slope=differentiated)
    logps, of_reference = (side.gather(-1, labels).squeeze(-1) for side in (policy, before))
    probabilities = before.exp()
    numbers = ComparedTokens(logps, before.sub_(policy).mul_(probabilities).sum(-1), of_reference)
    if not differentiated:
        return _Here(numbers, ())
    policy.exp_()
    of_divergences = torch.sub(policy, probabilities, out=before)
    del probabilities
    of_logps = policy.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=policy.dtype))
    if slope is not None:
        of_divergences.mul_(slope)
        of_logps.mul_(slope)
    return _Here(numbers, (head.to_rows(of_logps), head.to_rows(of_divergences)))


class _TrainedHead(torch.autograd.Function):
    """The same numbers, to the last bit, under a head that is trained: all logits are computed again backwards."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, reference, transform, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, labels, bias, reference.hidden)
        ctx.reference, ctx.transform, ctx.rows = replace(reference, hidden=None), transform, rows
        with torch.no_grad():
            found = _FrozenHead.apply(hidden.detach(), weight.detach(), labels, bias, reference, transform, rows)
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @first_order
    def backward(ctx, to_logps, to_divergences, _):  # type: ignore[no-untyped-def]
        hidden, weight, labels, bias, reference_hidden = ctx.saved_tensors
        head, theirs = (
            Head.of(hidden, weight, bias, ctx.transform),
            replace(ctx.reference, hidden=reference_hidden).head,
        )
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=head.wide)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=head.wide)
        for at in chunks(hidden, ctx.rows):
            chunk = _Chunk.of(head, hidden[at], theirs, reference_hidden[at], slope=True)
            error = _total_error(chunk, labels[at, None], to_logps[at, None], to_divergences[at, None])
            del chunk
            if to_bias is not None:
                to_bias.add_(error.sum(0), alpha=ctx.transform.scale)
            narrow = error.to(head.weight.dtype)
            del error
            add_product_(to_weight, narrow.T, hidden[at] * ctx.transform.scale)
            to_hidden[at] = head.to_rows(narrow)
            del narrow
        to_narrow_bias = None if to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, to_weight.to(weight.dtype), None, to_narrow_bias, None, None, None


def _total_error(chunk: _Chunk, labels: Tensor, to_logps: Tensor, to_divergences: Tensor) -> Tensor:
    """d loss / d transformed logits, (n, V), times the slope; overwrites the chunk."""
    policy, before = chunk.policy.exp_(), chunk.reference.exp_()
    error = before.neg_().add_(policy).mul_(to_divergences)
    error.sub_(policy.mul_(to_logps)).scatter_add_(-1, labels, to_logps)
    return error if chunk.slope is None else error.mul_(chunk.slope)
