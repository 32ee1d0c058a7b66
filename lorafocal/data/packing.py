"""Tokenised pairs to model inputs: prefix-shared packs, their padded twin, and the index both end in.

Every layout ends in the same `CompletionIndex`: which hidden rows predict which completion token of which sequence.
Nothing downstream shifts, masks or knows the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lorafocal.compatibility import LAYOUTS
from lorafocal.data.bins import fill_bins, padded_bins
from lorafocal.data.differing import differs_of
from lorafocal.data.tokens import TokenizedPair, by_twos
from lorafocal.data.turns import Turns, scored, scored_turns
from lorafocal.errors import InputError
from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.ops.segments import PairSpan, Segments, integers


@dataclass(frozen=True, slots=True)
class CompletionIndex:
    """Which row predicts which token of which sequence; N completion tokens that are scored, B pairs.

    Sequences 0..B-1 are the chosen answers, B..2B-1 the rejected ones (TRL's order), then come M further ones, if any;
    `sequence` never falls, so sums over sequences are sums over neighbouring rows.
    """

    positions: Tensor  # (N,) int64: rows of the flattened hidden states
    labels: Tensor  # (N,) int64: token ids
    sequence: Tensor  # (N,) int64 in [0, 2B + M)
    lengths: Tensor  # (2B + M,) int64: scored completion tokens of each sequence


class PackedOthers(NamedTuple):
    """The M further answers of a pack, whose sequences come behind those of its pairs."""

    pair: Tensor  # (M,) int64: whose prompt each answers, never falling
    scores: Tensor | None  # (M,) float64, a judge's
    reference: Tensor | None  # (M,) float64: summed log-probs in nats, as they were looked up

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same with each tensor moved by `move`."""
        scores, reference = (None if of is None else move(of) for of in (self.scores, self.reference))
        return self._replace(pair=move(self.pair), scores=scores, reference=reference)


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass: whole pairs, with their index. Packed rows carry `segments`, padded ones a mask.

    `reference` are the looked-up log-probs of its pairs, (B,) each, in nats and float64 as they were read; `scores`
    a judge's, float64.
    """

    input_ids: Tensor  # (1, T) packed, (2B, T) padded
    position_ids: Tensor  # like input_ids
    index: CompletionIndex
    pair_ids: tuple[str, ...]
    segments: Segments | None = None
    attention_mask: Tensor | None = None
    reference: PairLogps | None = None
    reference_tokens: Tensor | None = None  # (N,) float64, where they were looked up
    scores: PairScores | None = None
    others: PackedOthers | None = None
    groups: Tensor | None = None  # (B,) int64: places in the collator's `groups`
    embeddings: Tensor | None = None  # (B, E) float64, of the prompts
    turns: Tensor | None = None  # (N,) int64: of the assistant, from 0; where some completion has several
    differs: Tensor | None = None  # (N,) bool: the pair's other answer does not have it

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)

    @property
    def num_rows(self) -> int:
        """Token rows that the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same pack on `device`; host integers stay where they are."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        index = self.index
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            index=CompletionIndex(*map(move, (index.positions, index.labels, index.sequence, index.lengths))),
            segments=self.segments and self.segments.to(device, non_blocking=non_blocking),
            attention_mask=moved(self.attention_mask),
            reference=self.reference and PairLogps(*map(move, self.reference)),
            reference_tokens=moved(self.reference_tokens),
            scores=self.scores and PairScores(*map(move, self.scores)),
            others=self.others and self.others.moved(move),
            groups=moved(self.groups),
            embeddings=moved(self.embeddings),
            turns=moved(self.turns),
            differs=moved(self.differs),
        )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimiser step's share of one rank, as packs, and the pairs they were made of. May be empty."""

    packs: tuple[Pack, ...]
    pairs: tuple[TokenizedPair, ...]  # to pack again with a smaller budget

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)


def share_prefixes(pairs: Sequence[TokenizedPair]) -> Pack:
    """One row `[prompt | chosen | rejected]` a pair, no padding; the rejected answer's positions restart.

    A pair without a rejected answer is the row `[prompt | chosen]`. Further answers follow their pair by twos, as if
    they were pairs: `[prompt | other | other]`, an odd one alone.
    """
    row = _Row()
    chosen_rows: list[list[int]] = []
    rejected_rows: list[list[int]] = []
    other_rows: list[list[int]] = []
    for pair in pairs:
        chosen, rejected = row.add(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        chosen_rows.append(chosen)
        rejected_rows.append(rejected)
        for one, *two in by_twos(pair.others):
            other_rows += row.add(one.prompt_ids, one.completion_ids, *(other.completion_ids for other in two))
    index = _index(chosen_rows + rejected_rows + other_rows, pairs)
    return Pack(
        integers(row.input_ids)[None],
        integers(row.position_ids)[None],
        index,
        tuple(pair.id for pair in pairs),
        segments=Segments.of(tuple(row.spans)),
        turns=turns_of(pairs),
    )


@dataclass(slots=True)
class _Row:
    """A packed row in the making."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    spans: list[PairSpan] = field(default_factory=list)

    def add(self, prompt_ids: list[int], *answers: list[int]) -> list[list[int]]:
        """A prompt and one or two answers to it, behind what is there: for each the rows that predict its tokens."""
        first, second = map(len, (*answers, [])[:2])
        prompt = len(prompt_ids)
        span = PairSpan(len(self.input_ids), prompt, first, second)
        self.input_ids += chain(prompt_ids, *answers)
        self.position_ids += [*range(prompt + first), *range(prompt, prompt + second)]
        self.spans.append(span)
        last_of_prompt = span.start + prompt - 1  # predicts the first token of both answers
        rows = [[*range(last_of_prompt, last_of_prompt + first)]]
        rows.append([last_of_prompt, *range(span.answers, span.stop - 1)][:second])
        return rows[: len(answers)]


def pad_sequences(pairs: Sequence[TokenizedPair], *, pad_token_id: int = 0) -> Pack:
    """The slow twin: 2B right-padded rows, prompts twice, and M of further answers; which token pads is the same.

    An answer without tokens gets no row.
    """
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    answers += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    answers += [(other.prompt_ids, other.completion_ids) for pair in pairs for other in pair.others]
    width = max(pair.longest for pair in pairs)
    sequences: list[list[int]] = []
    rows: list[list[int]] = []
    for prompt, completion in answers:
        last_of_prompt = len(sequences) * width + len(prompt) - 1
        rows.append([*range(last_of_prompt, last_of_prompt + len(completion))])
        if completion:
            sequences.append([*prompt, *completion])
    columns = torch.arange(width)
    index = _index(rows, pairs)
    return Pack(
        torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in sequences]),
        columns.expand(len(sequences), width).contiguous(),
        index,
        tuple(pair.id for pair in pairs),
        attention_mask=(columns < torch.tensor([[len(ids)] for ids in sequences])).long(),
        turns=turns_of(pairs),
    )


def fill_up(pack: Pack, bucket: int) -> Pack:
    """A packed row of T tokens rounded up to a multiple of `bucket` by a last span that no one sees or is scored on.

    Compiled layers see few lengths that way. The filler's positions are all 0: models whose rotary embedding goes by
    the longest position must not notice it.
    """
    missing = -pack.num_rows % bucket
    if not missing or pack.segments is None:
        return pack
    spans = (*pack.segments.spans, PairSpan(pack.num_rows, missing, 0, 0))
    filler = torch.zeros(1, missing, dtype=torch.int64)
    return replace(
        pack,
        input_ids=torch.cat((pack.input_ids, filler), dim=1),
        position_ids=torch.cat((pack.position_ids, filler), dim=1),
        segments=Segments.of(spans),
    )


def looked_up(pairs: Sequence[TokenizedPair]) -> PairLogps | None:
    """The reference's log-probs of B pairs, (B,) each, in nats; None unless every pair has them."""
    known = [pair.reference for pair in pairs if pair.reference is not None]
    if not pairs or len(known) < len(pairs):
        return None
    return PairLogps(*torch.tensor(known, dtype=torch.float64).unbind(1))


def looked_up_tokens(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """The same of the tokens of their answers, (N,) float64, chosen answers first; None unless every pair has them."""
    known = [pair.reference_tokens for pair in pairs if pair.reference_tokens is not None]
    if not pairs or len(known) < len(pairs) or any(pair.others for pair in pairs):
        return None
    return torch.cat([side.double() for sides in zip(*known, strict=True) for side in sides])


def scores_of(pairs: Sequence[TokenizedPair]) -> PairScores | None:
    """A judge's scores of B pairs, (B,) each; None unless every pair has both."""
    known = [(pair.score_chosen, pair.score_rejected) for pair in pairs]
    if not known or any(score is None for both in known for score in both):
        return None
    return PairScores(*torch.tensor(known, dtype=torch.float64).unbind(1))


def others_of(pairs: Sequence[TokenizedPair]) -> PackedOthers:
    """The further answers of B pairs, in their order; scores or log-probs only where every one of them has its own."""
    others = [(place, other) for place, pair in enumerate(pairs) for other in pair.others]
    return PackedOthers(
        torch.tensor([place for place, _ in others], dtype=torch.int64),
        _numbers([other.score for _, other in others]),
        _numbers([other.reference for _, other in others]),
    )


def _numbers(values: Sequence[float | None]) -> Tensor | None:
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float64)


def _index(rows: list[list[int]], pairs: Sequence[TokenizedPair]) -> CompletionIndex:
    """`rows` are those that predict each token of each sequence; tokens that are not scored are left out."""
    sides = _sides(pairs)
    rows = [[*scored(row, turns)] for row, (_, turns) in zip(rows, sides, strict=True)]
    labels = [token for ids, turns in sides for token in scored(ids, turns)]
    lengths = torch.tensor([len(row) for row in rows])
    return CompletionIndex(
        integers([position for row in rows for position in row]),
        integers(labels),
        torch.arange(len(rows)).repeat_interleave(lengths),
        lengths,
    )


def _sides(pairs: Sequence[TokenizedPair]) -> list[tuple[list[int], Turns]]:
    """Chosen, rejected, then further completions, and the turns of their tokens."""
    sides = [(pair.chosen_ids, pair.chosen_turns) for pair in pairs]
    sides += [(pair.rejected_ids, pair.rejected_turns) for pair in pairs]
    return sides + [(other.completion_ids, None) for pair in pairs for other in pair.others]


def turns_of(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """The turn of each scored token, (N,); those of further answers are of turn 0. None where nothing has several."""
    if not any(pair.several_turns for pair in pairs):
        return None
    return integers([turn for side in _sides(pairs) for turn in scored_turns(*side)])


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pairs of one optimiser step to packs of at most `tokens_per_pack` token rows.

    The budget changes memory and speed, never the result. What an objective does not ask for is not in the packs: no
    rejected answers without `rejected`, no further ones without `others`; without `differs` nothing says which tokens
    do. `groups` are the names that a pair's may be of, `embedding` the numbers that its prompt's has: 0 for none.
    Packed rows come in multiples of `bucket` tokens.
    """

    layout: str = "packed"
    tokens_per_pack: int = 2048
    pad_token_id: int = 0
    rejected: bool = True
    bucket: int = 1
    others: bool = False
    differs: bool = False
    groups: tuple[str, ...] = ()
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"packing.layout: {self.layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
        if self.tokens_per_pack < 1:
            raise InputError(f"packing.tokens: {self.tokens_per_pack} is not a positive number of tokens")
        if self.bucket < 1 or (self.bucket > 1 and self.layout == "padded"):
            raise InputError(
                f"bucket is {self.bucket}: packed rows are rounded up to a positive multiple, padded never"
            )

    def __call__(self, pairs: Iterable[TokenizedPair]) -> StepBatch:
        pairs = list(map(self._asked, pairs))
        together = [[pairs[i] for i in members] for members in self._bins(pairs)]
        return StepBatch(tuple(map(self._pack, together)), tuple(pairs))

    def rows_alone(self, pair: TokenizedPair) -> int:
        """Token rows of a pack of this pair alone, the smallest that it can be in."""
        pair = self._asked(pair)
        if self.layout == "padded":
            return self._sequences(pair) * pair.longest
        return -(-pair.shared_length // self.bucket) * self.bucket

    def _asked(self, pair: TokenizedPair) -> TokenizedPair:
        """The pair without what is not in the packs."""
        if pair.others and not self.others:
            pair = replace(pair, others=())
        return pair if self.rejected else _without_rejected(pair)

    def _sequences(self, pair: TokenizedPair) -> int:
        return 1 + self.rejected + len(pair.others)

    def _bins(self, pairs: list[TokenizedPair]) -> list[list[int]]:
        if not pairs:
            return []
        if self.layout == "padded":
            rows = list(map(self._sequences, pairs))
            return padded_bins([pair.longest for pair in pairs], self.tokens_per_pack, rows=rows)
        budget = max(self.tokens_per_pack // self.bucket, 1) * self.bucket  # still the budget after rounding up
        return fill_bins([pair.shared_length for pair in pairs], budget)

    def _pack(self, pairs: list[TokenizedPair]) -> Pack:
        if self.layout == "padded":
            pack = pad_sequences(pairs, pad_token_id=self.pad_token_id)
        else:
            pack = fill_up(share_prefixes(pairs), self.bucket)
        return replace(
            pack,
            reference=looked_up(pairs),
            reference_tokens=looked_up_tokens(pairs),
            scores=scores_of(pairs),
            others=others_of(pairs) if self.others else None,
            differs=differs_of(pairs) if self.differs else None,
            groups=self._groups_of(pairs) if self.groups else None,
            embeddings=self._embeddings_of(pairs) if self.embedding else None,
        )

    def _groups_of(self, pairs: list[TokenizedPair]) -> Tensor:
        """Places in `groups`, (B,); a pair of none, such as a filler, counts as of the first."""
        for pair in pairs:
            if pair.group is not None and pair.group not in self.groups:
                raise InputError(
                    f"pair {pair.id!r} is of group {pair.group!r}, which no training pair is of; known:"
                    f" {', '.join(self.groups)}"
                )
        return torch.tensor([0 if pair.group is None else self.groups.index(pair.group) for pair in pairs])

    def _embeddings_of(self, pairs: list[TokenizedPair]) -> Tensor:
        """(B, E); a pair without one, such as a filler, has zeros."""
        zeros = (0.0,) * self.embedding
        for pair in pairs:
            if pair.embedding is not None and len(pair.embedding) != self.embedding:
                raise InputError(
                    f"pair {pair.id!r} has a prompt_embedding of {len(pair.embedding)} numbers and the training pairs"
                    f" have {self.embedding}: make all of them with the same encoder"
                )
        return torch.tensor([pair.embedding or zeros for pair in pairs], dtype=torch.float64)


def _without_rejected(pair: TokenizedPair) -> TokenizedPair:
    return replace(pair, rejected_ids=[], rejected_turns=None, reference_tokens=None)
