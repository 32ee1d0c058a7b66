"""Attention of a pack on a CPU: a block of its rows at a time over all keys that the last of them sees.

The scores of a block are one batched product for all heads and their softmax is whole, where torch's own kernel for
CPUs carries it through products of small tiles. The backward computes it again: nothing but queries, keys and values
is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorafocal.ops.autograd import first_order, without_autocast
from lorafocal.ops.segments import SHORT_PAIR, PairSpan, Segments

# Rows of a block at most: with more, more is computed that the mask hides; with fewer, products are small. A short
# pair, whose mask is its own, must be one block.
ROWS = max(112, SHORT_PAIR)
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def row_block_attention(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D_v)
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """`shared_prefix_attention_plain` without cap or sinks, in the inputs' dtype: (1, H, T, D_v).

    Raises ValueError where the tensors are not one row of as many tokens as the segments have.
    """
    tokens = segments.spans[-1].stop
    if query.shape[0] != 1 or query.shape[2] != tokens:
        raise ValueError(f"segments of one row of {tokens} tokens, and queries (B, H, T, D) of {tuple(query.shape)}")
    output: Tensor = _RowBlocks.apply(query, key, value, segments, scaling, window)
    return output


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, query, key, value, segments, scaling, window):  # type: ignore[no-untyped-def]
        q, k, v = query[0], key[0], value[0]
        output = _rows_first(len(q), v)
        scores = _Scores(scaling, window, segments, len(q), q)
        for piece in _pieces(segments):
            keys, values = piece.keys_of(k), piece.keys_of(v)
            for start, rows, n in piece.blocks():
                block = _grouped(q.narrow(1, start, rows), len(k))
                weights = scores.softmax(block, keys.narrow(1, 0, n), rows, piece.short)
                drawn = torch.bmm(weights, values.narrow(1, 0, n))
                output.narrow(1, start, rows).copy_(_by_head(drawn, rows))
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scaling, ctx.window = segments, scaling, window
        return output[None]

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        q, k, v = (tensor[0] for tensor in ctx.saved_tensors)
        to_q, to_k, to_v = (_rows_first(len(x), x) for x in (q, k, v))
        scores = _Scores(ctx.scaling, ctx.window, ctx.segments, len(q), q)
        space = torch.empty_like(scores.space)
        for piece in _pieces(ctx.segments):
            keys, values = piece.keys_of(k), piece.keys_of(v)
            for start, rows, n in reversed(piece.blocks()):  # the last one sees all keys
                block, drawn = (_grouped(x.narrow(1, start, rows), len(k)) for x in (q, upstream[0]))
                weights = scores.softmax(block, keys.narrow(1, 0, n), rows, piece.short)
                piece.add(torch.bmm(weights.transpose(1, 2), drawn), to_v)
                to_scores = space.narrow(0, 0, weights.numel()).view_as(weights)
                torch.bmm(drawn, values.narrow(1, 0, n).transpose(1, 2), out=to_scores)
                _softmax_backward(to_scores, weights, -1, weights.dtype, grad_input=to_scores)
                piece.add(torch.bmm(to_scores.transpose(1, 2), block), to_k)
                to_q.narrow(1, start, rows).copy_(_by_head(torch.bmm(to_scores, keys.narrow(1, 0, n)), rows))
        return to_q.mul_(ctx.scaling)[None], to_k.mul_(ctx.scaling)[None], to_v[None], None, None, None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that attend to the first `shared` rows of their pair, which end before them, and to those from `start`."""

    pair: int  # its first row in the pack
    shared: int  # the prompt's, of a rejected answer
    start: int
    rows: int
    short: PairSpan | None = None  # a whole pair, whose rows do not see all that stands before them

    def blocks(self) -> list[tuple[int, int, int]]:
        """(first row, rows, keys that the last of them sees), of lengths as even as can be."""
        rows = -(-self.rows // -(-self.rows // ROWS))
        bounds = [*range(0, self.rows, rows), self.rows]
        return [(self.start + first, last - first, self.shared + last) for first, last in pairwise(bounds)]

    def keys_of(self, x: Tensor) -> Tensor:
        """Of x (H_kv, T, D) the rows that are attended to, (H_kv, shared + rows, D)."""
        own = x.narrow(1, self.start, self.rows)
        if not self.shared:
            return own
        return torch.cat((x.narrow(1, self.pair, self.shared).transpose(0, 1), own.transpose(0, 1))).transpose(0, 1)

    def add(self, gradient: Tensor, whole: Tensor) -> None:
        """A block's gradient towards its keys, (H_kv, n, D), to that towards all rows, (H_kv, T, D), which is empty:
        the last block, which has all keys, must come first, and the piece that shared rows are of before this one."""
        if self.shared:
            whole.narrow(1, self.pair, self.shared).add_(gradient.narrow(1, 0, self.shared))
        count = gradient.shape[1] - self.shared
        given, own = gradient.narrow(1, self.shared, count), whole.narrow(1, self.start, count)
        if count == self.rows:
            own.copy_(given)
        else:
            own.add_(given)


def _pieces(segments: Segments) -> Iterator[_Piece]:
    for span in segments.spans:
        if span.is_short:
            yield _Piece(span.start, 0, span.start, span.stop - span.start, span)
            continue
        yield _Piece(span.start, 0, span.start, span.prompt + span.chosen)
        if span.rejected:
            yield _Piece(span.start, span.prompt, span.answers, span.rejected)


class _Scores:
    """Scores of one block after the other, in the same memory: fresh memory would have to be cleared by the system."""

    def __init__(self, scaling: float, window: int | None, segments: Segments, heads: int, like: Tensor) -> None:
        self.scaling, self.window, self.segments = scaling, window, segments
        self.space = like.new_empty(heads * ROWS * max(segments.longest_key, SHORT_PAIR))

    def softmax(self, block: Tensor, keys: Tensor, rows: int, short: PairSpan | None) -> Tensor:
        """Of block (H_kv, G rows, D) over keys (H_kv, n, D), of which its last row sees the last: (H_kv, G rows, n)."""
        groups, height, n = len(block), block.shape[1], keys.shape[1]
        scores = self.space.narrow(0, 0, groups * height * n).view(groups, height, n)
        torch.baddbmm(scores, block, keys.transpose(1, 2), beta=0, alpha=self.scaling, out=scores)
        hides = self.window is not None and self.window < n
        masked = n if hides or short else rows  # of the keys before the rows, all are seen
        ceiling = self.segments.ceiling(rows, masked, self.window if hides else None, scores, short)
        within = _by_head(scores, rows).narrow(2, n - masked, masked)
        torch.minimum(within, ceiling, out=within)
        return torch.softmax(scores, -1, out=scores)


def _rows_first(heads: int, like: Tensor) -> Tensor:
    """Empty (heads, T, D) for `like` (_, T, D), laid out by rows as projections read and write."""
    return like.new_empty(like.shape[1], heads, like.shape[2]).transpose(0, 1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(H, rows, _) -> (H_kv, H / H_kv rows, _): heads that share a key one below the other."""
    return x if len(x) == kv_heads else x.reshape(kv_heads, -1, x.shape[2])


def _by_head(x: Tensor, rows: int) -> Tensor:
    """(H_kv, H / H_kv rows, _) -> (H, rows, _)"""
    return x.view(-1, rows, x.shape[2])
