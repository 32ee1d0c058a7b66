"""Attention of a pack on a CPU: a block of its rows at a time over all keys that the last of them sees.

The scores of a block are one batched product for all heads and their softmax is whole, where torch's own kernel for
CPUs carries it through products of small tiles. The backward computes it again: nothing but queries, keys and values
is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafocal.ops.logps import first_order
from lorafocal.ops.segments import SHORT_PAIR, Segments

# Of a block at most: with more, more is computed that the mask hides; with fewer, products are small. A short pair,
# whose mask is its own, must be one block.
ROWS = max(112, SHORT_PAIR)
_softmax_backward = torch.ops.aten._softmax_backward_data.out


def row_block_attention(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D_v)
    segments: Segments,
    *,
    scaling: float,
) -> Tensor:
    """`shared_prefix_attention_plain` without window, cap or sinks, in the inputs' dtype: (1, H, T, D_v)."""
    output: Tensor = _RowBlocks.apply(query, key, value, segments, scaling)
    return output


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
        q, k, v = query[0], key[0], value[0]
        output = _rows_first(len(q), v)
        space = _space(q, segments)
        for piece in _pieces(segments):
            keys, values = piece.keys_of(k), piece.keys_of(v)
            for start, rows, n in piece.blocks():
                block = _grouped(q.narrow(1, start, rows), len(k))
                weights = _weights(block, keys.narrow(1, 0, n), rows, piece.seen, scaling, space)
                drawn = torch.bmm(weights, values.narrow(1, 0, n))
                output.narrow(1, start, rows).copy_(_by_head(drawn, rows))
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scaling = segments, scaling
        return output[None]

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = (tensor[0] for tensor in ctx.saved_tensors)
        to_q, to_k, to_v = (_rows_first(len(x), x) for x in (q, k, v))
        space, second_space = _space(q, ctx.segments), _space(q, ctx.segments)
        for piece in _pieces(ctx.segments):
            keys, values = piece.keys_of(k), piece.keys_of(v)
            for start, rows, n in reversed(piece.blocks()):  # the last one sees all keys
                block, drawn = (_grouped(x.narrow(1, start, rows), len(k)) for x in (q, upstream[0]))
                weights = _weights(block, keys.narrow(1, 0, n), rows, piece.seen, ctx.scaling, space)
                piece.add(torch.bmm(weights.transpose(1, 2), drawn), to_v)
                scores = second_space.narrow(0, 0, weights.numel()).view_as(weights)  # gradients towards them
                torch.bmm(drawn, values.narrow(1, 0, n).transpose(1, 2), out=scores)
                _softmax_backward(scores, weights, -1, weights.dtype, grad_input=scores)
                piece.add(torch.bmm(scores.transpose(1, 2), block), to_k)
                to_q.narrow(1, start, rows).copy_(_by_head(torch.bmm(scores, keys.narrow(1, 0, n)), rows))
        return to_q.mul_(ctx.scaling)[None], to_k.mul_(ctx.scaling)[None], to_v[None], None, None


class _Piece(NamedTuple):
    """Rows that attend to the first `prompt` rows of their pair, which need not stand before them, and to their own."""

    pair: int  # its first row in the pack
    prompt: int
    start: int
    rows: int
    seen: Tensor | None = None  # (rows, rows) boolean, of which row sees which of its own, where not just causal

    def blocks(self) -> list[tuple[int, int, int]]:
        """(first row, rows, keys that the last of them sees), of lengths as even as can be."""
        rows = -(-self.rows // -(-self.rows // ROWS))
        bounds = [*range(0, self.rows, rows), self.rows]
        return [(self.start + first, last - first, self.prompt + last) for first, last in pairwise(bounds)]

    def keys_of(self, x: Tensor) -> Tensor:
        """Of x (H_kv, T, D) the rows that are attended to, (H_kv, prompt + rows, D)."""
        own = x.narrow(1, self.start, self.rows)
        if not self.prompt:
            return own
        return torch.cat((x.narrow(1, self.pair, self.prompt).transpose(0, 1), own.transpose(0, 1))).transpose(0, 1)

    def add(self, gradient: Tensor, whole: Tensor) -> None:
        """A block's gradient towards the keys it sees, (H_kv, n, D), to that towards `whole`, (H_kv, T, D).

        The last block comes first and sees all keys, so that rows of this piece have no gradient before it.
        """
        if self.prompt:
            whole.narrow(1, self.pair, self.prompt).add_(gradient.narrow(1, 0, self.prompt))
        count = gradient.shape[1] - self.prompt
        given, own = gradient.narrow(1, self.prompt, count), whole.narrow(1, self.start, count)
        if count == self.rows:
            own.copy_(given)
        else:
            own.add_(given)


def _pieces(segments: Segments) -> Iterator[_Piece]:
    """A prompt's rows before those which add to its gradient."""
    for span in segments.spans:
        if span.is_short:
            rows = span.stop - span.start
            yield _Piece(span.start, 0, span.start, rows, segments.mask(rows, rows, None, torch.device("cpu"), span))
            continue
        yield _Piece(span.start, 0, span.start, span.prompt + span.chosen)
        if span.rejected:
            yield _Piece(span.start, span.prompt, span.answers, span.rejected)


def _weights(block: Tensor, keys: Tensor, rows: int, seen: Tensor | None, scaling: float, space: Tensor) -> Tensor:
    """Softmax of block (H_kv, G rows, D) over keys (H_kv, n, D), of which its last row sees all: (H_kv, G rows, n), in
    the memory of `space`."""
    groups, height, n = len(block), block.shape[1], keys.shape[1]
    scores = space.narrow(0, 0, groups * height * n).view(groups, height, n)
    torch.baddbmm(scores, block, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    if seen is None:
        _by_head(scores, rows).narrow(2, n - rows, rows).add_(_later(rows, scores.dtype))
    else:
        _by_head(scores, rows).masked_fill_(~seen, -torch.inf)
    return torch.softmax(scores, -1, out=scores)


@cache
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows): 0, and -inf for those after the row itself."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype).triu(1)


def _rows_first(heads: int, like: Tensor) -> Tensor:
    """Empty (heads, T, D) for `like` (_, T, D), laid out by rows as projections read and write."""
    return like.new_empty(like.shape[1], heads, like.shape[2]).transpose(0, 1)


def _space(query: Tensor, segments: Segments) -> Tensor:
    """For the scores of any block: fresh memory for each would have to be cleared by the system."""
    return query.new_empty(len(query) * ROWS * max(segments.longest_key, SHORT_PAIR))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(H, rows, D) -> (H_kv, H / H_kv rows, D): heads that share a key one below the other."""
    return x if len(x) == kv_heads else x.reshape(kv_heads, -1, x.shape[2])


def _by_head(x: Tensor, rows: int) -> Tensor:
    """(H_kv, G rows, D) -> (H, rows, D)"""
    return x.view(-1, rows, x.shape[2])
