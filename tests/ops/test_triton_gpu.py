"""The Triton kernels and the head on a card: bf16 and fp32 against the definitions."""

from __future__ import annotations

import pytest
import torch

from lorafocal.ops import elementwise
from lorafocal.ops.logps import LogitTransform, head_fold_, token_logps, token_logps_plain
from tests.triton_cases import CASES, TRANSFORMS, worst

pytestmark = pytest.mark.gpu

# The largest difference relative to the largest entry: in bf16 two results that round apart, one step in 256.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 5e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_its_definition(name, dtype):
    difference, where = worst(CASES[name](elementwise.load("triton"), dtype, "cuda"))
    assert difference <= TOLERANCES[dtype], where


def head_inputs(rows: int = 700, width: int = 64, vocabulary: int = 4109):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to("cuda", torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=generator).to("cuda", torch.bfloat16)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator).cuda()


@pytest.mark.row("36")
@pytest.mark.parametrize("fold", ["torch", "triton"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("train_head", [False, True])
def test_bf16_products_give_the_log_probs_and_gradients_of_fp64(fold, transform, train_head):
    """Log-probs to fp32; gradients, whose rows pass through bf16 before their product, to bf16."""
    function = head_fold_ if fold == "torch" else elementwise.load("triton").head_fold_
    hidden, weight, labels = head_inputs()
    upstream = torch.linspace(-1, 2, len(labels), device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_(train_head)]
    logps = token_logps(*leaves, labels, None, transform, rows_per_chunk=128, fold=function)
    logps.backward(upstream)
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = token_logps_plain(*exact, labels, None, transform)
    expected.backward(upstream.double())
    assert logps.dtype == torch.float32
    assert (logps - expected).abs().max() < 1e-4
    for ours, theirs in zip(leaves, exact, strict=True):
        if theirs.grad is not None:
            error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
            assert error < 5e-3


@pytest.mark.row("36")
@pytest.mark.parametrize("fold", ["torch", "triton"])
def test_a_chunk_of_logits_is_all_the_head_adds_to_the_peak(fold):
    function = head_fold_ if fold == "torch" else elementwise.load("triton").head_fold_
    hidden, weight, labels = head_inputs(rows=4096, vocabulary=32000)
    chunk = 256 * 32000
    hidden.requires_grad_()
    token_logps(hidden, weight, labels, rows_per_chunk=256, fold=function)  # the libraries' workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logps(hidden, weight, labels, None, LogitTransform(), rows_per_chunk=256, fold=function)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * chunk * (4 + 2) + 2 * hidden.numel() * 4


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("width", [4109, 128256])
def test_log_probs_are_equal_to_the_last_bit_whatever_is_asked_for_beside_them(width, transform):
    """What the identity probe of a policy and its live reference relies on."""
    fold = elementwise.load("triton").head_fold_
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(64, width, generator=generator, device="cuda") * 4
    labels = torch.randint(width, (64,), generator=generator, device="cuda")
    alone = fold(logits.clone(), labels, None, transform).logps
    for dtype in (None, torch.bfloat16, torch.float32):
        for collisions in (None, torch.empty(64, dtype=torch.float64, device="cuda")):
            assert torch.equal(fold(logits.clone(), labels, dtype, transform, collisions).logps, alone)
