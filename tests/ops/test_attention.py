"""Shared-prefix attention: per-segment SDPA and the variable-length path against the full-mask definition."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorafocal.errors import InputError
from lorafocal.ops.attention import (
    PairSpan,
    Segments,
    causal_mask,
    sdpa_shared_prefix_attention,
    shared_prefix_attention,
    shared_prefix_attention_plain,
    varlen_shared_prefix_attention,
    visible,
)

SCALING = 0.3


def varlen_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """What torch's `varlen_attn` computes, sequence by sequence, with masks aligned at the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[1] == key.shape[1] or enable_gqa
    outputs = []
    for number in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[number] : cu_seq_q[number + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[number] : cu_seq_k[number + 1]].transpose(0, 1) for x in (key, value))
        assert q.shape[1] <= max_q
        assert k.shape[1] <= max_k
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        left, right = window_size
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        to = torch.arange(k.shape[1])[None]
        seen = (to <= at + right) & ((to >= at - left) if left >= 0 else True)
        scores = (q @ k.transpose(-1, -2)) * scale
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def spans(*sizes: tuple[int, int, int]) -> tuple[PairSpan, ...]:
    start, out = 0, []
    for size in sizes:
        out.append(PairSpan(start, *size))
        start = out[-1].stop
    return tuple(out)


def tensors(total: int, heads: int = 4, kv_heads: int = 2, dim: int = 6):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, total, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


# An answer may be missing: a plain SFT step has no rejected ones.
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


def value_and_gradients(path, segments, kv_heads=2, **more):
    total = segments.spans[-1].stop
    leaves = tensors(total, kv_heads=kv_heads)
    upstream = torch.randn(1, 4, total, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = path(*leaves, segments, scaling=SCALING, **more)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_alike(ours, definition):
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(SIZES, st.sampled_from([None, 1, 3, 50]), st.sampled_from([2, 4]))
def test_every_path_equals_the_definition_in_value_and_gradient(sizes, window, kv_heads):
    segments = Segments.of(spans(*sizes))
    more = {"kv_heads": kv_heads, "window": window}
    definition = value_and_gradients(shared_prefix_attention_plain, segments, **more)
    assert_alike(value_and_gradients(sdpa_shared_prefix_attention, segments, **more), definition)
    flash = value_and_gradients(varlen_shared_prefix_attention, segments, kernel=varlen_stand_in, **more)
    assert_alike(flash, definition)


@pytest.mark.row("F15")
@settings(max_examples=20, derandomize=True, deadline=None)
@given(SIZES, st.sampled_from([None, 3]), st.sampled_from([None, 0.7]), st.booleans())
def test_caps_and_sinks_equal_the_definition_in_value_and_gradient(sizes, window, softcap, with_sinks):
    segments = Segments.of(spans(*sizes))
    sinks = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64) if with_sinks else None
    more = {"window": window, "softcap": softcap, "sinks": sinks}
    definition = value_and_gradients(shared_prefix_attention_plain, segments, **more)
    assert_alike(value_and_gradients(sdpa_shared_prefix_attention, segments, **more), definition)


@pytest.mark.row("F15")
@pytest.mark.parametrize("asked", ["softcap", "sinks"])
def test_caps_and_sinks_are_those_of_the_models_that_have_them(asked):
    """One segment against the attention functions of Gemma-2 and gpt-oss themselves."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    module = nn.Identity()
    module.num_key_value_groups, module.sinks = 2, torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    theirs, more = (gemma2, {"softcap": 0.7}) if asked == "softcap" else (gpt_oss, {})
    q, k, v = tensors(6)
    mask = torch.full((6, 6), -1e9, dtype=torch.float64).triu(1)[None, None]
    wanted, _ = theirs(module, q, k, v, mask, scaling=SCALING, **more)
    segments = Segments.of(spans((6, 0, 0)))
    given = more if asked == "softcap" else {"sinks": module.sinks}
    ours = shared_prefix_attention_plain(q, k, v, segments, scaling=SCALING, **given)
    torch.testing.assert_close(ours.transpose(1, 2), wanted, rtol=1e-6, atol=1e-6)
    registered = {"softcap": 0.7} if asked == "softcap" else {"s_aux": module.sinks}
    through, _ = shared_prefix_attention(module, q, k, v, None, scaling=SCALING, segments=segments, **registered)
    torch.testing.assert_close(through, ours.transpose(1, 2))


def test_a_capped_softmax_stays_in_fp32_under_autocast():
    q, k, v = (x.detach().float() for x in tensors(20))
    segments = Segments.of(spans((6, 8, 6)))
    wanted = sdpa_shared_prefix_attention(q, k, v, segments, scaling=SCALING, softcap=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = sdpa_shared_prefix_attention(q, k, v, segments, scaling=SCALING, softcap=5.0)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"sinks": torch.zeros(4)}])
def test_the_kernel_of_a_gpu_refuses_caps_and_sinks(asked):
    segments = Segments.of(spans((1, 1, 1)))
    with pytest.raises(InputError, match="packs on a GPU"):
        varlen_shared_prefix_attention(*tensors(3), segments, scaling=1.0, kernel=varlen_stand_in, **asked)


def test_the_stand_in_has_the_kernels_exact_signature():
    from torch.nn.attention.varlen import varlen_attn

    def shape(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    kernel = [p for p in shape(varlen_attn) if p[0] != "return_aux"]
    assert [p for p in shape(varlen_stand_in) if p[0] != "return_aux"] == kernel


def test_an_older_kernel_without_window_scale_and_groups_gives_the_same():
    def old_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        return varlen_stand_in(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            scale=query.shape[-1] ** -0.5,
            window_size=(-1, 0),
        )

    segments = Segments.of(spans((3, 4, 2), (1, 1, 5)))
    leaves = tensors(segments.spans[-1].stop)
    definition = shared_prefix_attention_plain(*leaves, segments, scaling=SCALING)
    ours = varlen_shared_prefix_attention(*leaves, segments, scaling=SCALING, kernel=old_kernel)
    torch.testing.assert_close(ours, definition)
    with pytest.raises(InputError, match="window_size"):
        varlen_shared_prefix_attention(*leaves, segments, scaling=SCALING, window=2, kernel=old_kernel)


def test_who_sees_whom():
    """prompt 2, chosen 1, rejected 2, then a second pair: the rejected answer sees the prompt, never the chosen."""
    mask = visible(spans((2, 1, 2), (1, 1, 1)), None, torch.device("cpu")).int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_masks_align_at_the_bottom_right_and_windows_count_the_key_itself():
    assert causal_mask(2, 4, None, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, 2, torch.device("cpu")).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_bounds_of_a_pack():
    segments = Segments.of(spans((2, 1, 2), (1, 3, 1)))
    assert segments.query_bounds.tolist() == [0, 3, 5, 9, 10]
    assert segments.key_bounds.tolist() == [0, 3, 7, 11, 13]
    assert segments.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 5, 9]
    assert (segments.longest_query, segments.longest_key) == (4, 4)


def test_bounds_of_a_pack_without_some_answers():
    """An answer of no tokens is no segment, so the kernel never sees an empty query."""
    segments = Segments.of(spans((2, 1, 0), (1, 0, 2)))
    assert segments.query_bounds.tolist() == [0, 3, 4, 6]
    assert segments.key_bounds.tolist() == [0, 3, 4, 7]
    assert segments.key_index.tolist() == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.row("F12", "20")
def test_a_call_without_bounds_is_refused_by_name():
    """A stock call would attend across pairs; the registered function says so instead."""
    q, k, v = tensors(5)
    with pytest.raises(InputError, match="without `segments`"):
        shared_prefix_attention(nn.Identity(), q, k, v, None)


def test_what_packs_cannot_do_is_refused_by_name():
    """Dropout, and a mask that the model has made by itself."""
    q, k, v = tensors(3)
    segments = Segments.of(spans((1, 1, 1)))
    with pytest.raises(InputError, match="dropout"):
        shared_prefix_attention(nn.Identity(), q, k, v, None, segments=segments, dropout=0.1)
    with pytest.raises(InputError, match="mask of its own"):
        shared_prefix_attention(nn.Identity(), q, k, v, torch.zeros(1, 1, 3, 3), segments=segments)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
def test_the_real_kernel_equals_the_definition(window):
    """bf16 FlashAttention against the same-dtype definition's own error."""
    segments = Segments.of(spans((20, 33, 17), (1, 1, 1), (64, 5, 90))).to(torch.device("cuda"))
    exact_in = [x.detach().cuda() for x in tensors(segments.spans[-1].stop, 4, 2, 64)]
    leaves = [x.bfloat16() for x in exact_in]
    exact = shared_prefix_attention_plain(*[x.double() for x in leaves], segments, scaling=SCALING, window=window)
    twin = shared_prefix_attention_plain(*leaves, segments, scaling=SCALING, window=window)
    ours = varlen_shared_prefix_attention(*leaves, segments, scaling=SCALING, window=window)
    assert (ours - exact).abs().max() <= 3 * (twin - exact).abs().max() + 1e-3
