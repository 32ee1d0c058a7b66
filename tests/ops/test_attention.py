"""Shared-prefix attention: per-segment SDPA and the variable-length path against the full-mask definition."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.nn.functional import scaled_dot_product_attention

from lorafocal.errors import InputError
from lorafocal.ops import attention
from lorafocal.ops.attention import (
    PairSpan,
    Segments,
    _GatheredKeys,
    attend,
    choice_for,
    sdpa_shared_prefix_attention,
    shared_prefix_attention,
    shared_prefix_attention_plain,
    varlen_shared_prefix_attention,
    visible,
)
from lorafocal.ops.attention_kernels import ROW_BLOCKS, Kernel, KernelChoice
from lorafocal.ops.plain_attention import causal_mask
from lorafocal.ops.segments import roles, segments_of

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


VARLEN = Kernel("stand-in", varlen_stand_in)


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


@settings(max_examples=30)
@given(SIZES, st.sampled_from([None, 1, 3, 50]), st.sampled_from([2, 4]))
def test_every_path_equals_the_definition_in_value_and_gradient(sizes, window, kv_heads):
    segments = Segments.of(spans(*sizes))
    more = {"kv_heads": kv_heads, "window": window}
    definition = value_and_gradients(shared_prefix_attention_plain, segments, **more)
    assert_alike(value_and_gradients(sdpa_shared_prefix_attention, segments, **more), definition)
    flash = value_and_gradients(varlen_shared_prefix_attention, segments, kernel=VARLEN, **more)
    assert_alike(flash, definition)


@pytest.mark.row("F15")
@settings(max_examples=20)
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


def test_the_stand_in_has_the_kernels_exact_signature():
    """That of torch 2.13; an older kernel has a part of it, or `is_causal` for a window, and torch 2.9 none."""
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn

    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name not in ("return_aux", "is_causal")]

    kernel, ours = shape(varlen_attn), shape(varlen_stand_in)
    older = Version(torch.__version__) < Version("2.13")
    assert [each for each in ours if each in kernel or not older] == kernel


def test_an_older_kernel_without_window_scale_and_groups_gives_the_same():
    """Before `enable_gqa`, torch's kernel took groups without a word: keys are not repeated, nor kept so."""

    def old_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        assert (query.shape[1], key.shape[1]) == (4, 2)
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
            enable_gqa=True,
        )

    segments = Segments.of(spans((3, 4, 2), (1, 1, 5)))
    leaves = tensors(segments.spans[-1].stop)
    definition = shared_prefix_attention_plain(*leaves, segments, scaling=SCALING)
    ours = varlen_shared_prefix_attention(*leaves, segments, scaling=SCALING, kernel=Kernel("old", old_kernel))
    torch.testing.assert_close(ours, definition)


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
    assert segments.shared_rows.tolist() == [0, 1, 5]
    assert segments.second_place.tolist() == [3, 4, 11]
    assert segments.first_place.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 12]
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


# Of the first pair both segments are one call, of the others each is its own.
LONG = ((9, 20, 30), (2, 1, 94), (40, 31, 26), (50, 60, 0), (1, 0, 97))


@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_short_and_long_pairs_equal_the_definition(window, softcap):
    segments = Segments.of(spans(*LONG))
    more = {"window": window, "softcap": softcap}
    definition = value_and_gradients(shared_prefix_attention_plain, segments, **more)
    assert_alike(value_and_gradients(sdpa_shared_prefix_attention, segments, **more), definition)


def test_masks_are_made_once_for_all_layers(monkeypatch):
    segments = Segments.of(spans(*LONG))
    leaves = tensors(segments.spans[-1].stop)
    first = sdpa_shared_prefix_attention(*leaves, segments, scaling=SCALING)
    monkeypatch.setattr("lorafocal.ops.segments.causal_mask", None)
    assert torch.equal(sdpa_shared_prefix_attention(*leaves, segments, scaling=SCALING), first)


@pytest.mark.parametrize("more", [{}, {"window": 3}])
def test_no_path_waits_for_the_device(more):
    """Tensors without data refuse to tell a value, as a host that waited for one would ask; forward and backward."""
    meta = torch.device("meta")
    segments = Segments.of(spans(*LONG)).to(meta)
    leaves = [x.detach().to(meta).requires_grad_() for x in tensors(segments.spans[-1].stop)]

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), softcap=0.0):
        assert (max_q, max_k) == (segments.longest_query, segments.longest_key)
        return q * k.mean() * v.mean()

    sdpa_shared_prefix_attention(*leaves, segments, scaling=SCALING, **more).sum().backward()
    options = more | {"scaling": SCALING, "kernel": Kernel("shapes only", kernel)}
    varlen_shared_prefix_attention(*leaves, segments, **options).sum().backward()


def test_outputs_lie_as_the_next_product_reads_them():
    """Row by row, so that joining the heads copies nothing."""
    leaves = [x.detach() for x in tensors(110)]
    segments = Segments.of(spans((4, 60, 46)))
    out, _ = shared_prefix_attention(nn.Identity(), *leaves, None, segments=segments)
    assert out.is_contiguous()
    assert out.shape == (1, 110, 4, 6)


@pytest.mark.parametrize("sizes", [((3, 4, 2), (1, 1, 5), (2, 3, 0)), LONG])
def test_gradients_of_gathered_keys_are_the_same_bits_every_time(sizes):
    """In fp32 too, where a sum in another order would show; no prompt's gradient is added up by atomics."""
    segments = Segments.of(spans(*sizes))
    rows = torch.randn(segments.spans[-1].stop, 2, 3, requires_grad=True)
    upstream = torch.randn(len(segments.key_index), 2, 3)
    ours, expected = _GatheredKeys.apply(rows, segments), rows.index_select(0, segments.key_index)
    assert torch.equal(ours, expected)
    [to_rows] = torch.autograd.grad(ours, rows, upstream)
    torch.testing.assert_close(to_rows, torch.autograd.grad(expected, rows, upstream)[0])
    assert len(set(segments.shared_rows.tolist())) == len(segments.shared_rows)


@pytest.mark.row("F16")
@settings(max_examples=20)
@given(SIZES)
def test_the_bounds_of_a_pack_survive_as_one_byte_a_token(sizes):
    segments = Segments.of(spans(*sizes))
    told = roles(segments)
    assert told.dtype == torch.int8
    assert told.shape == (segments.spans[-1].stop,)
    assert segments_of(told, torch.device("cpu")) is segments
    rebuilt = segments_of(told, torch.device("meta"))  # never seen there, as after many other packs
    assert rebuilt.spans == segments.spans


@pytest.mark.row("F16")
@pytest.mark.parametrize(
    "more", [{}, {"sliding_window": 3}, {"softcap": 0.7}, {"s_aux": torch.tensor([-1.0, 0, 1, 2])}]
)
def test_the_opaque_operator_equals_the_open_one_in_value_and_gradient(more):
    segments = Segments.of(spans((3, 4, 2), (1, 1, 5), (2, 3, 0)))
    leaves = tensors(segments.spans[-1].stop)
    leaves += [x.double().requires_grad_() for x in more.values() if isinstance(x, torch.Tensor)]
    results = []
    for bounds in (segments, roles(segments)):
        options = more | ({"s_aux": leaves[3]} if "s_aux" in more else {})
        out, _ = shared_prefix_attention(nn.Identity(), *leaves[:3], None, segments=bounds, **options)
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    assert_alike(*results)


@pytest.mark.row("F16")
def test_the_opaque_operator_keeps_the_rules_of_the_library():
    segments = Segments.of(spans((3, 4, 2), (1, 1, 5)))
    arguments = (*tensors(16), roles(segments), None, SCALING, 3, None)
    torch.library.opcheck(torch.ops.lorafocal.packed_attention.default, arguments)


def test_a_window_that_hides_nothing_asks_no_kernel_for_one():
    """Mistral's 4096 on shorter pairs: a kernel without windows will do, and squares stay plain causal calls."""
    segments = Segments.of(spans((3, 4, 2)))
    leaves = tensors(9)
    wide = attend(*leaves, segments, scaling=SCALING, window=7)
    assert torch.equal(wide, attend(*leaves, segments, scaling=SCALING))
    assert not segments._made.keys() & {(7, 7, 7, torch.device("cpu"), None)}


def test_trained_sinks_and_uneven_heads_are_a_call_a_segment_with_the_reason(monkeypatch):
    q, _, v = tensors(3)
    sinks = torch.zeros(4, requires_grad=True)
    asked = {"window": None, "softcap": None}
    assert "sinks are trained" in choice_for(q, v, sinks=sinks, **asked).reason
    assert choice_for(q, v[..., :4], sinks=None, **asked) == ROW_BLOCKS  # which take them
    monkeypatch.setattr(attention, "choose", lambda *_, **__: KernelChoice("stand-in", VARLEN, ""))
    assert "keys have 6 dimensions, values 4" in choice_for(q, v[..., :4], sinks=None, **asked).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_mixed_inputs_are_cast_as_sdpa_casts_them(dtype):
    q, k, v = (x.detach().float() for x in tensors(20))
    segments = Segments.of(spans((6, 8, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = shared_prefix_attention(nn.Identity(), q.to(dtype), k, v, None, segments=segments)
    wanted, _ = shared_prefix_attention(nn.Identity(), *(x.bfloat16() for x in (q, k, v)), None, segments=segments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
def test_the_real_kernel_equals_the_definition(window):
    """bf16 FlashAttention against the same-dtype definition's own error."""
    segments = Segments.of(spans((20, 33, 17), (1, 1, 1), (64, 5, 90))).to(torch.device("cuda"))
    exact_in = [x.detach().cuda() for x in tensors(segments.spans[-1].stop, 4, 2, 64)]
    leaves = [x.bfloat16() for x in exact_in]
    exact = shared_prefix_attention_plain(*[x.double() for x in leaves], segments, scaling=SCALING, window=window)
    twin = shared_prefix_attention_plain(*leaves, segments, scaling=SCALING, window=window)
    kernel = choice_for(leaves[0], leaves[2], window=window, softcap=None, sinks=None).function
    assert kernel is not None
    ours = varlen_shared_prefix_attention(*leaves, segments, scaling=SCALING, window=window, kernel=kernel)
    assert (ours - exact).abs().max() <= 3 * (twin - exact).abs().max() + 1e-3


@pytest.mark.parametrize("window", [None, 3])
def test_where_sdpa_cannot_share_keys_among_heads_they_are_repeated(monkeypatch, window):
    """On CUDA fp32 or a mask would otherwise be the kernel that keeps all scores."""
    segments = Segments.of((PairSpan(0, 40, 50, 30), PairSpan(120, 3, 4, 2)))
    query, key, value = (torch.randn(1, heads, 129, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options = {"scaling": 0.3, "window": window}
    together = sdpa_shared_prefix_attention(query, key, value, segments, **options)
    calls = []

    def counted(q, k, v, *given, enable_gqa, **named):
        calls.append((k.shape[1], enable_gqa))
        return scaled_dot_product_attention(q, k, v, *given, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(attention, "_takes_groups", lambda *given: False)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(sdpa_shared_prefix_attention(query, key, value, segments, **options), together)
    assert {*calls} == {(4, False)}


def test_keys_are_shared_among_heads_by_cuda_s_flash_kernel_alone():
    def on(cuda: bool, dtype: torch.dtype, width: int = 128) -> Any:
        return SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 4, 9, width))

    mask, half = torch.ones(1, 1, dtype=torch.bool), on(True, torch.bfloat16)
    assert attention._takes_groups(on(False, torch.float32), on(False, torch.float32), mask)
    assert attention._takes_groups(half, half, None)
    assert not attention._takes_groups(half, half, mask)
    assert not attention._takes_groups(on(True, torch.float32), on(True, torch.float32), None)
    assert not attention._takes_groups(on(True, torch.bfloat16, 192), half, None)
    wide = on(True, torch.bfloat16, 512)
    assert not attention._takes_groups(wide, wide, None)


def test_wrappers_that_walk_arguments_hand_on_the_very_bounds():
    """FSDP2 casts the floating tensors of what a layer is called with, and makes dataclasses and lists anew for it."""
    bounds = Segments.of((PairSpan(0, 2, 3, 1),))
    assert _apply_to_tensors(lambda tensor: tensor.double(), {"segments": bounds})["segments"] is bounds
