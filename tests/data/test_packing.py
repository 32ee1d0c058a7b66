"""Packs, their index, and how pairs are spread over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafocal.data.packing import PairCollator, fill_up, looked_up, pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from tests.tiny import pairs, tiny_policy


def predicted(pack) -> list[list[tuple[int, int]]]:
    """For each sequence, (token whose row predicts, token predicted), read through the index alone."""
    flat = pack.input_ids.flatten().tolist()
    out: list[list[tuple[int, int]]] = [[] for _ in range(2 * pack.num_pairs)]
    for row, label, sequence in zip(
        *(t.tolist() for t in (pack.index.positions, pack.index.labels, pack.index.sequence)), strict=True
    ):
        out[sequence].append((flat[row], label))
    return out


def expected(batch: list[TokenizedPair]) -> list[list[tuple[int, int]]]:
    sides = [(p.prompt_ids, p.chosen_ids) for p in batch] + [(p.prompt_ids, p.rejected_ids) for p in batch]
    return [list(zip([prompt[-1], *ids[:-1]], ids, strict=True)) for prompt, ids in sides]


@pytest.mark.parametrize("layout", [share_prefixes, pad_sequences])
def test_every_layout_ends_in_the_same_index(layout):
    batch = pairs(6)
    pack = layout(batch)
    assert predicted(pack) == expected(batch)
    assert pack.index.sequence.tolist() == sorted(pack.index.sequence.tolist())
    assert pack.index.lengths.tolist() == [len(s) for s in expected(batch)]
    assert pack.pair_ids == tuple(pair.id for pair in batch)


def test_a_pair_is_stored_once_and_the_rejected_positions_restart_after_the_prompt():
    pack = share_prefixes([TokenizedPair("a", [5, 6], [7], [8, 9]), TokenizedPair("b", [4], [3], [2])])
    assert pack.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1]]
    assert pack.num_rows == 8


@pytest.mark.row("27")
def test_which_token_pads_is_invisible_even_if_it_is_the_eos():
    """Masks come from lengths: a pad that equals a real token hides none of them."""
    batch = [TokenizedPair("a", [5, 6], [7, 1], [8, 9, 1])]
    for pad in (0, 1):
        pack = pad_sequences(batch, pad_token_id=pad)
        assert pack.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        assert 1 in pack.index.labels.tolist()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_collator_keeps_every_pair_within_the_budget(layout):
    batch = pairs(30)
    step = PairCollator(layout, tokens_per_pack=80)(batch)
    assert step.num_pairs == 30
    assert list(step.pairs) == batch
    assert sorted(i for pack in step.packs for i in pack.pair_ids) == sorted(pair.id for pair in batch)
    assert all(pack.num_rows <= 80 for pack in step.packs)
    assert PairCollator(layout)([]).packs == PairCollator(layout)([]).pairs == ()


def test_packs_have_no_padding_and_share_prompts():
    batch = pairs(30)
    packed = sum(pack.num_rows for pack in PairCollator("packed", 200)(batch).packs)
    padded = sum(pack.num_rows for pack in PairCollator("padded", 200)(batch).packs)
    assert packed == sum(pair.shared_length for pair in batch) < padded


def test_moving_a_pack_moves_every_tensor():
    known = looked_up([replace(pair, reference=(-1.0, -2.0)) for pair in pairs(3)])
    for made in (share_prefixes(pairs(3)), pad_sequences(pairs(3))):
        pack = replace(made, reference=known)
        moved = pack.to(torch.device("meta"))
        tensors = [
            moved.input_ids,
            moved.position_ids,
            moved.index.positions,
            moved.index.labels,
            moved.index.sequence,
            moved.index.lengths,
            *moved.reference,
        ]
        tensors += (
            [moved.attention_mask]
            if moved.attention_mask is not None
            else [moved.segments.key_index, moved.segments.query_bounds, moved.segments.key_bounds]
        )
        assert all(tensor.is_meta for tensor in tensors)
        assert moved.pair_ids == pack.pair_ids


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_looked_up_references_travel_with_their_pairs(layout):
    batch = [replace(pair, reference=(-float(n) / 3, -2.0 * n)) for n, pair in enumerate(pairs(12))]
    known = {pair.id: pair.reference for pair in batch}
    for pack in PairCollator(layout, 60)(batch).packs:
        assert list(zip(*(side.tolist() for side in pack.reference), strict=True)) == [known[i] for i in pack.pair_ids]


def test_packs_have_references_only_where_every_pair_has_one():
    batch = [replace(pair, reference=(-1.0, -2.0)) for pair in pairs(4)]
    assert PairCollator()([*batch[:3], replace(batch[3], reference=None)]).packs[0].reference is None
    assert looked_up([]) is None


@pytest.mark.parametrize("bucket", [1, 8, 64])
def test_rows_come_in_multiples_of_the_bucket_within_the_budget(bucket):
    packs = PairCollator(tokens_per_pack=100, bucket=bucket)(pairs(30)).packs
    assert all(pack.num_rows % bucket == 0 and pack.num_rows <= 100 for pack in packs)
    assert sum(pack.num_pairs for pack in packs) == 30


def test_filler_changes_no_log_prob_and_no_longest_position():
    policy = tiny_policy(dtype=torch.float64)
    choose_layout(policy, "packed")
    pack = share_prefixes(pairs(5))
    filled = fill_up(pack, 64)
    assert filled.num_rows % 64 == 0 < filled.num_rows - pack.num_rows
    assert filled.position_ids.max() == pack.position_ids.max()
    assert filled.index is pack.index
    for ours, theirs in zip(sequence_logps(policy, filled), sequence_logps(policy, pack), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_unknown_layouts_and_budgets_are_refused():
    with pytest.raises(InputError, match=r"packing\.layout"):
        PairCollator("ragged")
    with pytest.raises(InputError, match=r"packing\.tokens"):
        PairCollator(tokens_per_pack=0)
    for layout, bucket in (("packed", 0), ("padded", 8)):
        with pytest.raises(InputError, match="bucket"):
            PairCollator(layout, bucket=bucket)
