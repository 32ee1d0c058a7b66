"""Which kernel attends in packs: by capability, checked against the definition, a broken wheel told in one line."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from types import ModuleType

import pytest
import torch

from lorafocal.ops.attention import PairSpan, Segments, shared_prefix_attention_plain, varlen_shared_prefix_attention
from lorafocal.ops.attention_kernels import (
    ROW_BLOCKS,
    TRIED,
    Kernel,
    Needs,
    check_bottom_right,
    choose,
    first_that_works,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    sources,
    torch_varlen,
)
from lorafocal.ops.plain_attention import softmax_attention
from tests.no_memory import whoever_says_it

CPU = torch.device("cpu")
HAS_VARLEN = pytest.mark.skipif(
    importlib.util.find_spec("torch.nn.attention.varlen") is None, reason="torch 2.10 is the first that has it"
)


def attention(q, k, v, q_bounds, k_bounds, *, scale, left=-1, top_left=False, softcap=None, sinks=None):
    """What variable-length kernels compute, segment by segment; `top_left` as flash-attn did before 2.1."""
    outputs = []
    for number in range(len(q_bounds) - 1):
        part = q[q_bounds[number] : q_bounds[number + 1]]
        keys, values = (x[k_bounds[number] : k_bounds[number + 1]] for x in (k, v))
        query = torch.arange(len(part))[:, None] + (0 if top_left else len(keys) - len(part))
        key = torch.arange(len(keys))[None]
        seen = (key <= query) & ((key >= query - left) if left >= 0 else True)
        heads_first = (x.transpose(0, 1)[None] for x in (part, keys, values))
        out = softmax_attention(*heads_first, seen, scaling=scale, softcap=softcap or None, sinks=sinks)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


# Signatures as in the libraries' own interfaces.


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal
    assert dropout_p == 0.0
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, left=window_size[0], softcap=softcap)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    """Releases differ in whether they return the log-sum-exp beside the output."""
    assert causal
    bounds = cu_seqlens_q, cu_seqlens_k
    return attention(q, k, v, *bounds, scale=softmax_scale, left=window_size[0], softcap=softcap), None


def flash_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # fmt: skip
    assert qv is None
    assert causal
    assert window_size[0] is None or window_size[0] >= 0
    left = -1 if window_size[0] is None else window_size[0]
    bounds = cu_seqlens_q, cu_seqlens_k
    return attention(q, k, v, *bounds, scale=softmax_scale, left=left, softcap=softcap, sinks=learnable_sink), None


def top_left(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, top_left=True)


def one_key_more(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                 window_size=(-1, -1)):  # fmt: skip
    """Counts a window without the key itself."""
    left = window_size[0] + (window_size[0] >= 0)
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, left=left)


def top_left_when_long(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                       causal=False):  # fmt: skip
    """A backend chosen by length, as cuDNN's."""
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, top_left=max_seqlen_q > 128)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 0.9 * upstream


def wrong_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    return attention(q, WrongGradient.apply(k), v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale)


def not_on_this_card(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore lines")


ALL = {"flash-attn 2": flash_2, "flash-attn 3": flash_3, "flash-attn 4": flash_4}


@pytest.mark.row("59")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_right_kernels_pass_the_check(name, dtype):
    needs = Needs(window=True, softcap=True, sinks=name == "flash-attn 4")
    kernel = Kernel(name, ALL[name])
    assert kernel.lacks(needs) == ""
    assert check_bottom_right(kernel, CPU, dtype, head_dim=8, needs=needs) == ""


@pytest.mark.row("59")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [top_left, top_left_when_long, wrong_backward, one_key_more])
def test_kernels_that_compute_something_else_are_refused(function, dtype):
    needs = Needs(window=function is one_key_more)
    fault = check_bottom_right(Kernel("wrong", function), CPU, dtype, head_dim=8, needs=needs)
    assert ("a window of 3" if needs.window else "bottom right") in fault


def test_the_check_is_exact_even_inside_an_operator_and_without_gradients():
    with torch.no_grad():
        assert check_bottom_right(Kernel("flash-attn 2", flash_2), CPU, torch.float32) == ""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert check_bottom_right(Kernel("flash-attn 2", flash_2), CPU, torch.float32) == ""
    assert any(queries != keys for queries, keys in TRIED)


def install(monkeypatch, **functions):
    """Fake libraries: module name (dots as two underscores) to its variable-length function."""
    for name, function in functions.items():
        module = ModuleType(name.replace("__", "."))
        module.flash_attn_varlen_func, module.__version__ = function, "2.8.3"
        monkeypatch.setitem(sys.modules, module.__name__, module)


def first(*found, needs=None):
    return first_that_works(found, CPU, torch.float32, 8, needs or Needs())


@pytest.mark.row("59")
def test_a_top_left_kernel_is_passed_over_by_name(monkeypatch):
    install(monkeypatch, flash_attn=top_left, flash_attn_interface=flash_3)
    choice = first(flash_attn_2, flash_attn_3)
    assert choice.name == "flash-attn 3"
    assert "flash-attn 2.8.3 does not compute causal masks aligned at the bottom right" in choice.reason


@pytest.mark.row("59")
def test_versions_before_2_1_are_passed_over_by_their_number(monkeypatch):
    install(monkeypatch, flash_attn=flash_2)
    sys.modules["flash_attn"].__version__ = "2.0.9"
    choice = first(flash_attn_2)
    assert (choice.name, choice.function) == ("SDPA per segment", None)
    assert "2.0.9 aligns causal masks at the top left" in choice.reason


BROKEN_WHEELS = {
    "import error": 'raise ImportError("libcudart.so.12: cannot open shared object file")',
    "undefined symbol": 'raise OSError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda\\nand more lines")',
    "without a version": "x = 1",
    "without the function": '__version__ = "2.8.3"',
    "an odd version": '__version__ = "unknown"',
    "needs another library": "import a_library_that_is_not_there",
    "an assertion": 'assert False, "wrong ABI"',
}


@pytest.mark.row("59")
@pytest.mark.parametrize("kind", BROKEN_WHEELS)
def test_a_broken_wheel_falls_back_with_one_line(kind, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(textwrap.dedent(BROKEN_WHEELS[kind]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    choice = first(flash_attn_2)
    sys.modules.pop("flash_attn", None)
    assert (choice.name, choice.function) == ("SDPA per segment", None)
    assert choice.reason.startswith("flash-attn-2 does not load: ")
    assert len(str(choice).splitlines()) == 1


@pytest.mark.row("59")
def test_what_is_not_installed_is_no_news(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    choice = first(flash_attn_2, flash_attn_3, flash_attn_4)
    assert choice.reason == "no variable-length kernel is installed"


def not_compiled(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    raise type("DSLRuntimeError", (Exception,), {})("no such architecture")


def test_a_kernel_whose_compiler_fails_is_passed_over(monkeypatch):
    """Compilers of kernels raise exceptions of no common kind."""
    install(monkeypatch, flash_attn=not_compiled)
    assert "does not run here: no such architecture" in first(flash_attn_2).reason


def test_a_kernel_that_the_card_does_not_run_is_passed_over(monkeypatch):
    install(monkeypatch, flash_attn=not_on_this_card)
    choice = first(flash_attn_2)
    assert "does not run here: FlashAttention only supports Ampere GPUs or newer. more lines" in choice.reason


@whoever_says_it
def test_a_device_without_memory_is_no_fault_of_a_kernel(monkeypatch, error):
    def lacks(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        raise error

    install(monkeypatch, flash_attn=lacks)
    with pytest.raises(type(error)) as raised:
        first(flash_attn_2)
    assert raised.value is error


@HAS_VARLEN
def test_torchs_own_kernel_does_not_run_on_a_cpu_and_says_so():
    choice = first(torch_varlen)
    assert choice.function is None
    assert f"torch {torch.__version__} varlen does not run here" in choice.reason


@HAS_VARLEN
@pytest.mark.parametrize(
    ("needs", "name", "passed"),
    [
        (Needs(softcap=True), "flash-attn 2.8.3", "varlen has no soft-capped scores"),
        (Needs(sinks=True), "flash-attn 4", "flash-attn 2.8.3 has no sinks"),
        (Needs(window=True, softcap=True, sinks=True), "flash-attn 4", "soft-capped scores, sinks; flash"),
    ],
)
def test_caps_and_sinks_get_the_kernel_that_has_them(needs, name, passed, monkeypatch):
    install(monkeypatch, flash_attn=flash_2, flash_attn__cute=flash_4)
    choice = first(torch_varlen, flash_attn_2, flash_attn_4, needs=needs)
    assert choice.name == name
    assert passed in choice.reason


@HAS_VARLEN
def test_without_such_a_kernel_caps_and_sinks_are_written_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    choice = first(torch_varlen, flash_attn_2, needs=Needs(softcap=True))
    assert (choice.name, choice.function) == ("softmax per segment", None)
    assert "has no soft-capped scores" in choice.reason


def test_cpus_take_blocks_of_rows_where_the_dtype_is_wide_and_scores_are_plain():
    assert choose(CPU, torch.float32) == choose(CPU, torch.float64, window=3) == ROW_BLOCKS
    assert str(ROW_BLOCKS) == "blocks of rows (on cpu)"
    assert choose(CPU, torch.float32, softcap=1.0).name == "softmax per segment"


def test_cpus_and_wide_dtypes_take_a_call_a_segment():
    assert str(choose(CPU, torch.bfloat16)) == "SDPA per segment (on cpu)"
    assert choose(CPU, torch.float32, sinks=True).name == "softmax per segment"
    assert "float32" in choose(torch.device("cuda"), torch.float32).reason


def test_the_order_follows_the_card():
    assert sources((8, 0)) == sources((8, 9)) == (torch_varlen, flash_attn_2)
    assert sources((9, 0))[0] is flash_attn_3
    assert sources((10, 0))[0] is flash_attn_4
    assert all(torch_varlen in sources(capability) for capability in ((8, 0), (9, 0), (10, 0), (12, 0)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (3, 0.7)])
def test_each_library_gives_the_definition_on_packs(name, window, softcap):
    sizes, start, spans = ((3, 4, 2), (1, 1, 5), (2, 3, 0), (1, 1, 1)), 0, []
    for prompt, chosen, rejected in sizes:
        spans.append(PairSpan(start, prompt, chosen, rejected))
        start = spans[-1].stop
    segments = Segments.of(tuple(spans))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, heads, start, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    more = {"scaling": 0.3, "window": window, "softcap": softcap}
    ours = varlen_shared_prefix_attention(*leaves, segments, kernel=Kernel(name, ALL[name]), **more)
    definition = shared_prefix_attention_plain(*leaves, segments, **more)
    torch.testing.assert_close(ours, definition, rtol=1e-11, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (ours, definition)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_this_cards_kernels_are_chosen_and_checked(head_dim):
    device = torch.device("cuda", 0)
    for window in (None, 512):
        choice = choose(device, torch.bfloat16, window=window, head_dim=head_dim)
        assert choice.function is not None, choice
        assert check_bottom_right(
            choice.function, device, torch.bfloat16, head_dim=head_dim, needs=Needs(window is not None)
        ) == ""  # fmt: skip
