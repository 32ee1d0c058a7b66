"""The log-prob head on a CPU: the vocabulary in tiles that stay in its cache.

The softmax is carried from one tile to the next (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867,
algorithm 3), and with it sum_v softmax_v W_v, of which the gradient towards the hidden rows is made. Logits of all
rows by the vocabulary would each be written to main memory, to pages that the system has to clear before, and read
from there by every pass of the fold; a tile's need not leave the cache. Tiles are as wide whatever the number of rows,
so that a row's numbers do not depend on how many stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorafocal.ops.logps import LogitTransform

ROWS = 2048  # of a tile at most: more do not make a product faster
WIDTH = 512  # tokens of a tile: 4 MiB in fp32


@dataclass(frozen=True, slots=True)
class TiledHead:
    """The head as it is multiplied by; `score` is that of `logps.Head`, with one tile of logits alive at a time."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    transform: LogitTransform
    wide: torch.dtype  # of products, sums and log-probs
    width: int = WIDTH  # tokens of a tile

    def score(
        self, hidden: Tensor, labels: Tensor, collisions: Tensor | None, *, differentiated: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (n,) and, where asked, their gradients towards the hidden rows, (n, D); fills in `collisions`."""
        hidden = hidden.to(self.wide)
        carried = _Carried.of(hidden, labels, len(self.weight), squared=collisions is not None, drawn=differentiated)
        for start, logits, rows in self._tiles(hidden):
            carried.add(start, logits, rows, self.transform)
        if collisions is not None:
            collisions.copy_(carried.collisions)
        if carried.drawn is None:
            return carried.logps, None
        of_label = self.weight[labels].to(self.wide)
        if carried.slope is not None:
            of_label = of_label * carried.slope
        return carried.logps, (of_label - carried.drawn.div_(carried.total)).mul_(self.transform.scale)

    def _tiles(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first token, its logits (n, width) before the transform, the head's rows (width, D)); memory is reused."""
        vocabulary, width = len(self.weight), min(self.width, len(self.weight))
        space = hidden.new_empty(len(hidden) * width)
        for start in range(0, vocabulary, width):
            rows = self.weight[start : start + width].to(self.wide)
            logits = space[: len(hidden) * len(rows)].view(len(hidden), len(rows))
            torch.mm(hidden, rows.T, out=logits)
            if self.bias is not None:
                logits += self.bias[start : start + width]
            yield start, logits, rows


@dataclass(slots=True)
class _Carried:
    """The softmax of n rows over the tiles so far."""

    labels: Tensor  # (n, 1), as is all but `drawn`
    top: Tensor  # the largest logit
    total: Tensor  # sum_v exp(logit_v - top)
    picked: Tensor  # the label's logit, once its tile has come
    squares: Tensor | None  # sum_v exp(logit_v - top)^2
    drawn: Tensor | None  # sum_v exp(logit_v - top) slope_v W_v, (n, D)
    slope: Tensor | None = None  # of the transform at the label, where it has one

    @classmethod
    def of(cls, hidden: Tensor, labels: Tensor, vocabulary: int, *, squared: bool, drawn: bool) -> _Carried:
        labels = labels[:, None]
        nothing = hidden.new_zeros(1, 1).expand(len(hidden), vocabulary)  # one number
        zero = nothing.gather(1, labels)  # refuses a label that no tile has
        lowest = torch.full_like(zero, torch.finfo(zero.dtype).min)  # finite: a tile may hold -inf alone
        return cls(
            labels, lowest, zero.clone(), zero, zero.clone() if squared else None,
            torch.zeros_like(hidden) if drawn else None,
        )  # fmt: skip

    def add(self, start: int, logits: Tensor, rows: Tensor, transform: LogitTransform) -> None:
        """One more tile: raw logits (n, width), which are overwritten, of the tokens from `start`, whose head rows
        are `rows`, (width, D)."""
        slope = transform.in_place_(logits, slope=self.drawn is not None)
        column = self.labels - start
        here = (column >= 0) & (column < len(rows))
        column.clamp_(0, len(rows) - 1)
        self.picked = torch.where(here, logits.gather(1, column), self.picked)
        top = torch.maximum(self.top, logits.amax(1, keepdim=True))
        shrunk = self.top.sub_(top).exp_()
        self.top = top
        weights = logits.sub_(top).exp_()
        self.total.mul_(shrunk).add_(weights.sum(1, keepdim=True))
        if self.squares is not None:
            self.squares.mul_(shrunk.square()).add_(weights.norm(dim=1, keepdim=True).square_())
        if slope is not None:
            at_label = slope.gather(1, column)
            self.slope = at_label if self.slope is None else torch.where(here, at_label, self.slope)
            weights.mul_(slope)
        if self.drawn is not None:
            self.drawn.mul_(shrunk).addmm_(weights, rows)

    @property
    def logps(self) -> Tensor:
        """Of the labels, (n,), nats."""
        return (self.picked - self.top - self.total.log()).squeeze(1)

    @property
    def collisions(self) -> Tensor:
        """log sum_v softmax_v^2, (n,), nats."""
        assert self.squares is not None  # was asked for
        return (self.squares.log() - 2 * self.total.log()).squeeze(1)
