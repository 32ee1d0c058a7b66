"""What stands in for a GPU's attention kernels is attention; the rest of the stub needs torch's CUDA build."""

from __future__ import annotations

import pytest
import torch

from lorafocal.ops.plain_attention import causal_mask, softmax_attention
from tests.stub_gpu import attention as stub


def parts(queries: int, keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, 4), (keys, 2), (keys, 2), (queries, 4))
    return [torch.randn(1, heads, rows, 8, generator=generator, dtype=torch.float64) for rows, heads in sizes]


@pytest.mark.parametrize("window", [None, 3])
def test_segments_attend_as_the_definition_does(window):
    *inputs, upstream = parts(5, 9)
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = softmax_attention(*leaves, causal_mask(5, 9, window, torch.device("cpu")), scaling=0.3)
    wanted.backward(upstream)
    q, k, v, up = (x[0].transpose(0, 1) for x in (*inputs, upstream))
    bounds = torch.tensor([0, 5]), torch.tensor([0, 9])
    asked = (5, 9, window is None, 0.3, [-1 if window is None else window - 1, 0])
    out, sums, _ = stub.varlen(q, k, v, *bounds, *asked)
    assert torch.allclose(out, wanted[0].transpose(0, 1), atol=1e-12)
    found = stub.varlen_backward(up, q, k, v, out, sums, *bounds, *asked[:3], None, *asked[3:])
    for ours, leaf in zip(found, leaves, strict=True):
        assert torch.allclose(ours, leaf.grad[0].transpose(0, 1), atol=1e-12)


def test_a_masked_batch_attends_as_torch_does_and_an_empty_row_is_zero():
    q, k, v, upstream = parts(6, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2] = False
    out = stub.efficient(q, k, v, mask, False)[0]
    shown = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    kept = [0, 1, 3, 4, 5]
    assert torch.allclose(out[:, :, kept], shown[:, :, kept], atol=1e-12)
    assert not out[:, :, 2].any()
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(stub.flash(q, k, v, 0.0, True)[0], causal, atol=1e-12)
    for ours, twin in zip(
        stub.flash_backward(upstream, q, k, v, None, None, None, None, 6, 6, 0.0, True, None, None),
        stub.efficient_backward(upstream, q, k, v, None, None, None, None, None, 0.0, None, True),
        strict=False,
    ):
        assert torch.equal(ours, twin)
