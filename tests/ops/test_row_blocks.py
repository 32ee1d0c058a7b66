"""Attention in blocks of rows against the definition, in value and gradient, and what it computes and keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafocal.ops import row_blocks
from lorafocal.ops.attention import attend, sdpa_shared_prefix_attention, shared_prefix_attention_plain
from lorafocal.ops.row_blocks import row_block_attention
from lorafocal.ops.segments import PairSpan, Segments
from tests.counting import Counter

SCALING = 0.3
# A short pair, pieces of one block and of several, a lone answer, and a pair without a chosen one.
MIXED = ((5, 8, 9), (7, 60, 40), (100, 250, 130), (4, 90, 0), (30, 0, 120), (1, 1, 1))


def segments_of(*sizes: tuple[int, int, int]) -> Segments:
    spans: list[PairSpan] = []
    for size in sizes:
        spans.append(PairSpan(spans[-1].stop if spans else 0, *size))
    return Segments.of(tuple(spans))


def tensors(total: int, *, heads: int = 4, kv_heads: int = 2, width: int = 6, to: int = 6, dtype=torch.float64):
    """Queries, keys, values and an upstream gradient, rows first in memory as projections write them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, width), (kv_heads, width), (kv_heads, to), (heads, to)
    return [torch.randn(1, total, *s, generator=generator, dtype=dtype).transpose(1, 2) for s in shapes]


def value_and_gradients(attention, segments: Segments, given: list[Tensor], window: int | None = None) -> list[Tensor]:
    *leaves, upstream = ([x.detach().requires_grad_() for x in given[:3]]) + given[3:]
    out = attention(*leaves, segments, scaling=SCALING, window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_alike(ours: list[Tensor], definition: list[Tensor]) -> None:
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(SIZES, st.sampled_from([1, 2, 4]), st.integers(1, 12), st.sampled_from([None, 1, 3, 50]))
def test_it_equals_the_definition_whatever_the_sizes(sizes, kv_heads, rows, window):
    """Blocks of any height, where no pair is short enough for a mask of its own."""
    segments = segments_of(*sizes)
    given = tensors(segments.spans[-1].stop, kv_heads=kv_heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafocal.ops.segments.SHORT_PAIR", 0)
        patch.setattr(row_blocks, "SHORT_PAIR", 0)
        patch.setattr(row_blocks, "ROWS", rows)
        ours = value_and_gradients(row_block_attention, segments, given, window)
        assert_alike(ours, value_and_gradients(shared_prefix_attention_plain, segments, given, window))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("to", "window"), [(6, None), (4, None), (6, 7), (6, 150)])
def test_short_and_long_pairs_equal_the_definition(kv_heads, to, window):
    segments = segments_of(*MIXED)
    given = tensors(segments.spans[-1].stop, kv_heads=kv_heads, to=to)
    ours = value_and_gradients(row_block_attention, segments, given, window)
    assert_alike(ours, value_and_gradients(shared_prefix_attention_plain, segments, given, window))


def test_in_fp32_it_is_as_near_to_the_exact_result_as_torch_s_kernel():
    segments = segments_of(*MIXED)
    wide = tensors(segments.spans[-1].stop, width=64, to=64)
    narrow = [x.float() for x in wide]
    exact = value_and_gradients(shared_prefix_attention_plain, segments, [x.double() for x in narrow])
    ours = value_and_gradients(row_block_attention, segments, narrow)
    torchs = value_and_gradients(sdpa_shared_prefix_attention, segments, narrow)
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


@pytest.mark.parametrize("window", [None, 200])  # the longest pair has more keys, the others do not
@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_pair_s_bits_are_the_same_in_any_pack(number, window):
    """Its blocks are cut by its own rows, and a window is one or none by its own keys."""
    segments, alone = segments_of(*MIXED), segments_of(MIXED[number])
    given = tensors(segments.spans[-1].stop, width=64, to=64, dtype=torch.float32)
    at = slice(segments.spans[number].start, segments.spans[number].stop)
    whole = value_and_gradients(attend, segments, given, window)
    own = value_and_gradients(attend, alone, [x[:, :, at] for x in given], window)
    for a, b in zip(whole, own, strict=True):
        assert torch.equal(a[:, :, at], b)


def test_under_autocast_it_computes_in_what_it_is_given():
    segments = segments_of((40, 60, 60))
    given = tensors(160, dtype=torch.float32)
    plain = value_and_gradients(row_block_attention, segments, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = value_and_gradients(row_block_attention, segments, given)
    assert all(torch.equal(a, b) for a, b in zip(autocast, plain, strict=True))


def test_infinite_scores_of_hidden_keys_are_hidden_too():
    segments = segments_of((40, 60, 60))
    query, key, value, _ = tensors(160, dtype=torch.float32)
    key[0, :, 90] = 3e38
    out = row_block_attention(query, key, value, segments, scaling=SCALING)
    assert out[0, :, :90].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 4, 17, 6), (2, 4, 9, 6)])
def test_rows_that_no_segment_has_are_refused(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="segments of one row of 9 tokens"):
        row_block_attention(x, x, x, segments_of((2, 3, 4)), scaling=SCALING)


def test_queries_keys_and_values_are_kept_and_nothing_else():
    segments = segments_of(*MIXED)
    leaves = [x.requires_grad_() for x in tensors(segments.spans[-1].stop)[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = row_block_attention(*leaves, segments, scaling=SCALING)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in leaves]
    assert out.transpose(1, 2).is_contiguous()  # rows first: joining the heads copies nothing


def test_little_more_is_computed_than_rows_see():
    """Two products forward and five backward, of the scores of an UltraFeedback pair and not a fifth more."""
    sizes = (185, 305, 305)
    segments = segments_of(sizes)
    prompt, chosen, rejected = sizes
    first, second = prompt + chosen, rejected
    seen = first * (first + 1) // 2 + second * prompt + second * (second + 1) // 2
    with Counter() as counter:
        value_and_gradients(row_block_attention, segments, tensors(sum(sizes)))
    assert seen * 7 * 2 * 4 * 6 <= counter.flops <= 1.2 * seen * 7 * 2 * 4 * 6


def test_a_second_derivative_is_refused():
    segments = segments_of((2, 3, 4))
    leaf = tensors(9)[0].requires_grad_()
    out = row_block_attention(leaf, *tensors(9)[1:3], segments, scaling=SCALING)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)
