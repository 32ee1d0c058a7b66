"""The log-prob head: the chunked operation against its definition, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafocal.ops.logps import LogitTransform, LogProbHead, token_logps, token_logps_plain

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=3.0),
    LogitTransform(2.0, 5.0),
]


def inputs(n: int = 23, d: int = 9, v: int = 31, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(v, (n,), generator=generator)
    return hidden, weight, labels, bias


@pytest.mark.row("36")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 23, 100])
def test_chunks_equal_the_definition(transform, with_bias, rows):
    hidden, weight, labels, bias = inputs()
    bias = bias if with_bias else None
    upstream = torch.linspace(-1, 2, 23, dtype=torch.float64)
    results = []
    for operation, more in ((token_logps_plain, {}), (token_logps, {"rows_per_chunk": rows})):
        leaf = hidden.clone().requires_grad_()
        logps = operation(leaf, weight, labels, bias, transform, **more)
        logps.backward(upstream)
        results.append((logps.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_those_of_finite_differences(transform):
    hidden, weight, labels, bias = inputs(5, 4, 7)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: token_logps(h, weight, labels, bias, transform, rows_per_chunk=2), (hidden,)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_trained_head_gets_its_gradients_by_recomputing_chunks(transform):
    hidden, weight, labels, bias = inputs(5, 4, 7)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, labels, b, transform, rows_per_chunk=2), leaves)


@pytest.mark.row("1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_trained_head_scores_as_the_frozen_one_to_the_last_bit(transform, dtype):
    """A policy whose head is trained must start at exactly its reference, whose head is the same one frozen."""
    hidden, weight, labels, bias = inputs(64, 32, 211, dtype)
    frozen = token_logps(hidden, weight, labels, bias, transform)
    trained = token_logps(hidden, weight.requires_grad_(), labels, bias, transform)
    assert trained.requires_grad
    assert torch.equal(trained, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_the_definition_in_the_same_dtype(dtype):
    hidden, weight, labels, _ = inputs(64, 32, 211, dtype)
    exact = token_logps_plain(hidden.double(), weight.double(), labels)
    twin = token_logps_plain(hidden, weight, labels)
    ours = token_logps(hidden, weight, labels, rows_per_chunk=16)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 3 * (twin - exact).abs().max() + 1e-6


@pytest.mark.row("36")
@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_of_all_rows_by_the_vocabulary_is_ever_made(train_head):
    """Every operation of forward and backward is watched: none yields more rows of logits than a chunk."""
    hidden, weight, labels, _ = inputs(64, 8, 301, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (301,):
                    largest = max(largest, tensor.numel() // 301)
            return out

    with Watch():
        token_logps(hidden, weight, labels, rows_per_chunk=16).sum().backward()
    assert 0 < largest <= 16


def test_nothing_is_saved_for_a_reference_pass():
    hidden, weight, labels, _ = inputs()
    with torch.no_grad():
        assert not token_logps(hidden.requires_grad_(), weight, labels).requires_grad


def head(dtype: torch.dtype = torch.float32) -> LogProbHead:
    torch.manual_seed(0)
    layer = nn.Linear(8, 31, bias=False, dtype=dtype)
    layer.__class__ = LogProbHead
    layer.labels = layer.rows = None
    layer.transform = LogitTransform()
    return layer.requires_grad_(False)


def test_without_labels_the_head_is_the_plain_head():
    layer, hidden = head(), torch.randn(2, 5, 8)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))


def test_with_labels_and_rows_it_scores_those_rows():
    layer, hidden = head(), torch.randn(2, 5, 8)
    layer.labels, layer.rows = torch.tensor([3, 4, 30]), torch.tensor([0, 9, 9])
    plain = token_logps_plain(hidden.flatten(0, 1)[layer.rows], layer.weight, layer.labels)
    torch.testing.assert_close(layer(hidden), plain[None], rtol=1e-6, atol=1e-6)


@pytest.mark.row("F13")
def test_autocast_does_not_make_the_log_probs_coarse():
    """Under bf16 autocast a plain head returns bf16: 0.04 nats a token off, and the sums of a run stick."""
    layer = head(torch.bfloat16)
    hidden = (torch.randn(1, 64, 8) * 3).bfloat16().requires_grad_()
    layer.labels = torch.arange(64) % 31
    exact = token_logps_plain(hidden[0].double(), layer.weight.double(), layer.labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(hidden)[0]
        ours.sum().backward()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5
    assert hidden.grad.isfinite().all()
