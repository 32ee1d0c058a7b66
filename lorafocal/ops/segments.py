"""Where the pairs of a pack lie in their row, and which of its rows see which."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafocal.ops.plain_attention import causal_mask

# Pairs of at most so many tokens are one masked call instead of two: on a CPU the calls cost more than the products.
SHORT_PAIR = 96


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

    @property
    def is_short(self) -> bool:
        """Whether one masked call serves both segments; a lone answer has only one."""
        return 0 < self.rejected and self.stop - self.start <= SHORT_PAIR

    @property
    def pieces(self) -> tuple[int, ...]:
        """Rows of the calls that attend to the pair, one or two."""
        first = self.prompt + self.chosen
        return (first, self.rejected) if self.rejected and not self.is_short else (first + self.rejected,)


class Segments:
    """Attention bounds of a pack of B pairs in a row of T tokens: built once a pack, from host integers.

    One opaque object, so that wrappers which walk a model's arguments leave it alone: FSDP2 would make a dataclass
    anew for every layer.
    """

    def __init__(
        self,
        spans: tuple[PairSpan, ...],
        key_index: Tensor,  # (K,) int64: rows of the keys, segment after segment
        query_bounds: Tensor,  # (S + 1,) int32: cumulative query lengths of the S segments, two a pair
        key_bounds: Tensor,  # (S + 1,) int32: cumulative key lengths
        first_place: Tensor,  # (T,) int64: where in `key_index` a row occurs first
        second_place: Tensor,  # (P,) int64: where it occurs again,
        shared_rows: Tensor,  # (P,) int64: of the rows that do, those of prompts with two answers
        longest_query: int,
        longest_key: int,
    ) -> None:
        self.spans = spans
        self.key_index, self.query_bounds, self.key_bounds = key_index, query_bounds, key_bounds
        self.first_place, self.second_place, self.shared_rows = first_place, second_place, shared_rows
        self.longest_query, self.longest_key = longest_query, longest_key
        self._made: dict[Any, Tensor] = {}  # masks and roles, when asked for

    @classmethod
    def of(cls, spans: tuple[PairSpan, ...]) -> Segments:
        keys: list[int] = []
        first: list[int] = []
        second: list[int] = []
        shared: list[int] = []
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        for span in spans:
            first += range(len(keys), len(keys) + span.prompt + span.chosen)
            keys += range(span.start, span.answers)
            query_lengths.append(span.prompt + span.chosen)
            key_lengths.append(span.prompt + span.chosen)
            if span.rejected:  # a lone answer has no second segment
                second += range(len(keys), len(keys) + span.prompt)
                shared += range(span.start, span.start + span.prompt)
                keys += shared[-span.prompt :]
                first += range(len(keys), len(keys) + span.rejected)
                keys += range(span.answers, span.stop)
                query_lengths.append(span.rejected)
                key_lengths.append(span.prompt + span.rejected)
        return cls(
            spans,
            integers(keys),
            _cumulative(query_lengths),
            _cumulative(key_lengths),
            integers(first),
            integers(second),
            integers(shared),
            max(query_lengths),
            max(key_lengths),
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Segments:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Segments(
            self.spans,
            key_index=move(self.key_index),
            query_bounds=move(self.query_bounds),
            key_bounds=move(self.key_bounds),
            first_place=move(self.first_place),
            second_place=move(self.second_place),
            shared_rows=move(self.shared_rows),
            longest_query=self.longest_query,
            longest_key=self.longest_key,
        )

    def mask(
        self, queries: int, keys: int, window: int | None, device: torch.device, whole: PairSpan | None = None
    ) -> Tensor:
        """(queries, keys) boolean: a segment's causal mask, or that of a `whole` pair; made once for all layers."""
        pair = whole and PairSpan(0, whole.prompt, whole.chosen, whole.rejected)
        key = (queries, keys, window, device, pair)
        if key not in self._made:
            made = causal_mask(queries, keys, window, device) if pair is None else visible((pair,), window, device)
            self._made[key] = made
        return self._made[key]

    def ceiling(
        self, queries: int, keys: int, window: int | None, like: Tensor, whole: PairSpan | None = None
    ) -> Tensor:
        """(queries, keys) in like's dtype: the most that a score may be, inf where `mask` sees and -inf elsewhere.

        The lesser of it and the scores hides infinite ones too, and is taken several times as fast as a mask is filled.
        """
        seen = self.mask(queries, keys, window, like.device, whole)
        key = (id(seen), like.dtype)  # a mask is kept as long as this
        if key not in self._made:
            self._made[key] = like.new_full(seen.shape, -torch.inf).masked_fill_(seen, torch.inf)
        return self._made[key]


def integers(values: Sequence[int]) -> Tensor:
    """(n,) int64: what `torch.tensor` makes of them, in a tenth of the time."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


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


# What a row of the pack is. One byte a token tells the spans, so that the bounds of any pack of T tokens are one
# tensor of T values: compiled layers see a shape and never what is in it.
PAIR_BEGINS, PROMPT, CHOSEN, REJECTED = range(4)
REMEMBERED = 64  # packs between their forward and their backward; a forgotten one is built again

_packs: OrderedDict[tuple[bytes, torch.device], Segments] = OrderedDict()


def roles(segments: Segments) -> Tensor:
    """The bounds as (T,) int8 on the host; `segments_of` finds this very object again."""
    if "roles" not in segments._made:  # once for all layers
        told = bytearray()
        for span in segments.spans:
            rows = (PAIR_BEGINS, 1), (PROMPT, span.prompt - 1), (CHOSEN, span.chosen), (REJECTED, span.rejected)
            told += b"".join(bytes([role]) * count for role, count in rows)
        _remember(bytes(told), segments.key_index.device, segments)
        segments._made["roles"] = torch.frombuffer(told, dtype=torch.int8)
    return segments._made["roles"]


def segments_of(told: Tensor, device: torch.device) -> Segments:
    """The bounds that `roles` told, on `device`."""
    written = told.numpy().tobytes()
    known = _packs.get((written, device))
    return known or _remember(written, device, Segments.of(_spans(written)).to(device))


def _remember(told: bytes, device: torch.device, segments: Segments) -> Segments:
    _packs[told, device] = segments
    _packs.move_to_end((told, device))
    if len(_packs) > REMEMBERED:
        _packs.popitem(last=False)
    return segments


def _spans(told: bytes) -> tuple[PairSpan, ...]:
    begins = [row for row, role in enumerate(told) if role == PAIR_BEGINS]
    return tuple(
        PairSpan(start, 1 + pair.count(PROMPT), pair.count(CHOSEN), pair.count(REJECTED))
        for start, stop in zip(begins, [*begins[1:], len(told)], strict=True)
        for pair in (told[start:stop],)
    )
