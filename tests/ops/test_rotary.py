"""Rotary positions as one function: transformers' own, values and gradients, and nothing of a token's size is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorafocal.model.stand_ins import rotary
from lorafocal.ops.elementwise import TORCH
from lorafocal.ops.rotary import rotated
from tests.ops.test_elementwise import random


def inputs(batch: int, angles: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of 4 heads and keys of 2 as projections leave them, (B, T, H, D) in memory; cos and sin."""
    query, key = (random(batch, 5, heads, 8, dtype=dtype, seed=heads).transpose(1, 2) for heads in (4, 2))
    return query, key, random(angles, 5, 8, dtype=dtype, seed=7), random(angles, 5, 8, dtype=dtype, seed=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (3, 1), (3, 3)])
def test_it_is_transformers_own_to_the_last_bit_and_lies_in_memory_as_it_does(dtype, batch, angles):
    given = inputs(batch, angles, dtype)
    for ours, theirs in zip(rotary(apply_rotary_pos_emb, TORCH, *given), apply_rotary_pos_emb(*given), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (3, 1), (3, 3)])
def test_its_gradient_is_autograd_s(batch, angles):
    query, key, cos, sin = inputs(batch, angles, torch.float64)
    leaf = query.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotated(x, cos, sin, TORCH), (leaf,))
    upstream = random(*query.shape, seed=9)
    (ours,) = torch.autograd.grad(rotated(leaf, cos, sin, TORCH), leaf, upstream)
    (theirs,) = torch.autograd.grad(apply_rotary_pos_emb(leaf, key, cos, sin)[0], leaf, upstream)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_its_backward_keeps_cos_and_sin_themselves():
    query, _, cos, sin = inputs(1, 1, torch.float32)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotated(query.requires_grad_(), cos, sin, TORCH)
    assert [tensor.data_ptr() for tensor in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_queries_alone_go_to_the_model_s_own_function():
    """As Qwen4's indexer has it."""
    query, _, cos, sin = inputs(1, 1, torch.float64)
    assert rotary(lambda *given, **named: (len(given), sorted(named)), TORCH, query, cos=cos, sin=sin) == (
        1, ["cos", "sin"],
    )  # fmt: skip


@pytest.mark.parametrize("what", ["another axis", "a part of the head", "another dtype", "angles with a gradient"])
def test_what_it_does_not_compute_goes_to_the_model_s_own_function(what):
    query, key, cos, sin = inputs(1, 1, torch.float64)
    called: list[int] = []
    named = {}
    if what == "another axis":
        query, key, named = query.transpose(1, 2), key.transpose(1, 2), {"unsqueeze_dim": 2}
    elif what == "a part of the head":
        cos, sin = cos[..., :4], sin[..., :4]
    elif what == "another dtype":
        cos, sin = cos.float(), sin.float()
    else:
        cos = cos.clone().requires_grad_()

    def own(*given: Tensor, **options: int) -> str:
        called.append(len(given) + len(options))
        return "own"

    assert rotary(own, TORCH, query, key, cos, sin, **named) == "own"
    assert called == [4 + len(named)]
