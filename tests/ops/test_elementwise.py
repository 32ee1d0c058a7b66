"""Elementwise functions: their gradients are autograd's, their values transformers' own to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lorafocal.errors import InputError
from lorafocal.ops.elementwise import GEGLU, TORCH, load, rms_norm
from lorafocal.ops.kernel_check import TOLERANCE, furthest, head_fold_results
from lorafocal.ops.logps import Fold, LogitTransform, head_fold_

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("gated", [TORCH.gated, GEGLU], ids=("swiglu", "geglu"))
def test_a_gate_s_backward_is_autograd_s_and_overwrites_upstream_alone(gated):
    gate, up, upstream = (random(5, 8, seed=seed) for seed in range(3))
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = gated.forward(*leaves)
    expected = (product.detach(), *torch.autograd.grad(product, leaves, upstream))
    found = gated.backward_(upstream.clone(), gate, up)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    assert torch.equal(gate, leaves[0])
    assert torch.equal(up, leaves[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_transformers_own_to_the_last_bit(dtype):
    gate, up = random(64, 32, dtype=dtype), random(64, 32, dtype=dtype, seed=1)
    assert torch.equal(TORCH.swiglu(gate, up), silu(gate) * up)
    assert torch.equal(GEGLU.forward(gate, up), gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("norm", "form"),
    [
        (LlamaRMSNorm, lambda weight: weight),
        (Olmo2RMSNorm, lambda weight: weight.float()),
        (GemmaRMSNorm, lambda weight: weight.float() + 1),
    ],
)
def test_the_dtype_of_the_weight_chooses_whose_norm_it_is(norm, form, dtype):
    module = norm(32, eps=1e-5).to(dtype)
    module.weight.data = random(32, dtype=dtype)
    x = random(64, 32, dtype=dtype, seed=1)
    y, rstd = rms_norm(x, form(module.weight.detach()), 1e-5)
    assert torch.equal(y, module(x))
    assert y.dtype == dtype
    assert rstd.dtype == torch.float32


def test_the_norm_s_backward_is_autograd_s():
    x, weight, upstream = random(5, 8).requires_grad_(), random(8, seed=1), random(5, 8, seed=2)
    y, rstd = TORCH.rms_norm(x, weight, 1e-6)
    ours = TORCH.rms_norm_backward(upstream, x.detach(), weight, rstd.detach())
    torch.testing.assert_close(ours, torch.autograd.grad(y, x, upstream)[0], rtol=1e-13, atol=1e-14)


def test_rotary_embedding_is_transformers_own_and_its_backward_the_transpose():
    x, cos, sin = random(6, 3, 8).requires_grad_(), random(6, 8, seed=1), random(6, 8, seed=2)
    turned = TORCH.rope(x, cos, sin)
    theirs, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos[None], sin[None])
    assert torch.equal(turned, theirs.transpose(1, 2)[0])
    upstream = random(6, 3, 8, seed=3)
    ours = TORCH.rope_backward(upstream, cos, sin)
    torch.testing.assert_close(ours, torch.autograd.grad(turned, x, upstream)[0], rtol=1e-13, atol=1e-14)


def test_an_unknown_set_and_kernels_without_a_device_are_refused_by_name(monkeypatch):
    assert load("torch") is TORCH
    with pytest.raises(InputError, match="choose torch or triton"):
        load("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA device"):
        load("triton")


def folded_in_doubles(logits, labels, dtype, transform, collisions=None):
    """The same fold with other roundings, as a kernel's are."""
    exact = None if collisions is None else torch.empty_like(collisions, dtype=torch.float64)
    fold = head_fold_(logits.double(), labels, None if dtype is None else torch.float64, transform, exact)
    if collisions is not None:
        collisions.copy_(exact.float())
    return Fold(fold.logps.float(), None if fold.error is None else (fold.error * fold.factor).to(dtype), 1.0)


@pytest.mark.parametrize("vocabulary", [15, 17, 111])  # here a row of the load-time check is nearly sure of one token
def test_the_check_of_a_fold_takes_roundings_where_one_token_has_nearly_all(vocabulary):
    logits = 4 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, vocabulary // 2, vocabulary - 1])

    def apart(fold):
        sets = replace(TORCH, head_fold_=fold), TORCH
        return furthest(*(head_fold_results(of, logits, labels, torch.float32, LogitTransform()) for of in sets))

    def off(*given):
        fold = folded_in_doubles(*given)
        return fold._replace(logps=fold.logps * (1 + 1e-4))

    assert apart(folded_in_doubles) <= TOLERANCE[torch.float32]
    assert apart(off) > TOLERANCE[torch.float32]
