"""KL(reference || policy) over the vocabulary: the chunked operation against its definition, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal.ops.divergences import ReferenceRows, compare_tokens, token_divergences_plain
from lorafocal.ops.logps import LogitTransform, token_logps, token_logps_plain
from tests.ops.test_logps import TRANSFORMS, LiveLogits, inputs


def reference(dtype: torch.dtype = torch.float64, *, biased: bool = True, **sizes: int) -> ReferenceRows:
    """Another model's rows, of another width, with logits of its own kind."""
    hidden, weight, _, bias = inputs(**({"d": 6, "seed": 1} | sizes), dtype=dtype)
    return ReferenceRows(hidden, weight, bias if biased else None, LogitTransform(0.5, 4.0))


def both_ways(
    hidden: Tensor, weight: Tensor, labels: Tensor, before: ReferenceRows, bias: Tensor | None, **how: Any
) -> list[list[Tensor | None]]:
    """Numbers and gradients by the definitions and by chunks, of one made-up loss."""
    results = []
    for chunked in (False, True):
        leaves = [
            x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)
        ]
        if chunked:
            found = compare_tokens(*leaves[:2], labels, before, leaves[2], **how)
        else:
            transform = how["transform"]
            then = (before.hidden, before.weight, labels, before.bias, before.transform)
            found = (
                token_logps_plain(*leaves[:2], labels, leaves[2], transform),
                token_divergences_plain(*leaves[:2], before, leaves[2], transform),
                token_logps_plain(*then),
            )
        up = torch.linspace(-1, 2, len(hidden), dtype=found[0].dtype)
        (up * found[0] + up.flip(0) ** 2 * found[1]).sum().backward()
        results.append([*(number.detach() for number in found), *(x if x is None else x.grad for x in leaves)])
    return results


def test_a_divergence_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2: ln 2 / 4; of logits that are their own weights."""
    weight = torch.eye(3, dtype=torch.float64)
    of = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    before = ReferenceRows(of[:1], weight)
    expected = torch.tensor([0.5 * 0.6931471805599453 - 0.25 * 0.6931471805599453], dtype=torch.float64)
    torch.testing.assert_close(token_divergences_plain(of[1:], weight, before), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        compare_tokens(of[1:], weight, torch.tensor([2]), before).divergences, expected, rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        expected, torch.nn.functional.kl_div(of[1:], of[:1], log_target=True, reduction="none").sum(-1)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_equal_the_definition(transform, biased, trained, rows) -> None:
    hidden, weight, labels, bias = inputs()
    leaves = hidden.requires_grad_(), weight.requires_grad_(trained)
    bias = bias.requires_grad_(trained) if biased else None
    plain, ours = both_ways(*leaves, labels, reference(biased=biased), bias, transform=transform, rows_per_chunk=rows)
    assert [x is not None for x in plain] == [True, True, True, True, trained, trained and biased]
    for expected, found in zip(plain, ours, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_finite_differences(transform, trained) -> None:
    hidden, weight, labels, bias = inputs(5, 4, 7)
    before = reference(n=5, v=7)
    leaves = [x.requires_grad_() for x in ((hidden, weight, bias) if trained else (hidden,))]

    def numbers(h: Tensor, w: Tensor = weight, b: Tensor = bias) -> tuple[Tensor, Tensor]:
        return compare_tokens(h, w, labels, before, b, transform, rows_per_chunk=2)[:2]

    assert torch.autograd.gradcheck(numbers, leaves)


@pytest.mark.row("1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_policy_that_is_its_reference_does_not_diverge_from_it_at_all(dtype, transform, trained) -> None:
    """Exactly 0, with a gradient of exactly 0, and the log-probs the same to the last bit."""
    hidden, weight, labels, bias = inputs(64, 32, 211, dtype)
    before = ReferenceRows(hidden.clone(), weight.clone(), bias, transform)
    hidden.requires_grad_()
    found = compare_tokens(hidden, weight.requires_grad_(trained), labels, before, bias, transform, rows_per_chunk=24)
    assert torch.equal(found.logps, found.reference)
    assert found.divergences.count_nonzero() == 0
    assert not found.reference.requires_grad
    found.divergences.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_low_precision_is_as_exact_as_the_definition_in_the_same_dtype(dtype, trained) -> None:
    hidden, weight, labels, bias = inputs(64, 32, 211, dtype)
    before = reference(dtype, n=64, v=211)
    wide = ReferenceRows(before.hidden.double(), before.weight.double(), before.bias.double(), before.transform)
    leaves = hidden.requires_grad_(), weight.requires_grad_(trained)
    exact, _ = both_ways(*(x.double().detach().requires_grad_(x.requires_grad) for x in leaves), labels, wide,
                         bias.double(), transform=LogitTransform())  # fmt: skip
    twin, ours = both_ways(*leaves, labels, before, bias, transform=LogitTransform(), rows_per_chunk=16)
    assert (exact[4] is not None) == trained
    for truth, plain, found in zip(exact, twin, ours, strict=True):
        if truth is not None:
            assert found.dtype == plain.dtype
            assert (found - truth).abs().max() <= 3 * (plain - truth).abs().max() + 1e-5


def test_certain_rows_stay_finite() -> None:
    """Logits a thousand apart: a probability of 0 adds nothing, and a token that the policy rules out its nats."""
    weight = torch.eye(3)
    rows = torch.tensor([[1000.0, 0, 0], [0, 1000.0, 0], [0, 0, 0]])
    hidden = rows.clone().requires_grad_()
    found = compare_tokens(hidden, weight, torch.tensor([0, 1, 2]), ReferenceRows(rows[[0, 2, 1]], weight))
    found.divergences.sum().backward()
    torch.testing.assert_close(found.divergences[0], torch.tensor(0.0))
    torch.testing.assert_close(found.divergences[1], torch.tensor(2000 / 3 - 1.0986123))
    torch.testing.assert_close(found.divergences[2], torch.tensor(1.0986123))
    assert hidden.grad.isfinite().all()


@pytest.mark.row("36")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("softcap", "most"), [(None, 3), (3.0, 4)])
def test_three_chunks_of_logits_are_alive_at_a_time(trained, softcap, most) -> None:
    """Of whole rows by the vocabulary never: the chunk's own, and both models' log-probs."""
    hidden, weight, labels, _ = inputs(64, 8, 301, torch.float32)
    before = ReferenceRows(inputs(64, 8, 301, torch.float32, seed=1)[0], weight.detach())
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with LiveLogits(weight) as live:
        found = compare_tokens(hidden, weight, labels, before, None, LogitTransform(softcap=softcap), rows_per_chunk=16)
        (found.logps + found.divergences).sum().backward()
    assert 0 < live.peak <= 16 * most


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_kept_for_the_backward(trained) -> None:
    """Two gradients a row; under a trained head the rows of both models."""
    hidden, weight, labels, _ = inputs(64, 8, 301, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        compare_tokens(hidden, weight, labels, ReferenceRows(hidden.detach() + 1, weight.detach()), rows_per_chunk=16)
    assert sum(x.numel() for x in kept if x.is_floating_point() and x.shape != weight.shape) == 2 * 64 * 8


def test_nothing_is_kept_without_gradients_and_log_probs_are_those_of_the_head_alone() -> None:
    hidden, weight, labels, bias = inputs()
    with torch.no_grad():
        found = compare_tokens(hidden.requires_grad_(), weight, labels, reference(), bias)
    assert not found.logps.requires_grad
    torch.testing.assert_close(found.logps, token_logps(hidden, weight, labels, bias).detach(), rtol=1e-12, atol=0)
    assert compare_tokens(hidden[:0], weight, labels[:0], reference(n=0)).divergences.shape == (0,)


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_derivative_is_refused(trained) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=trained)
    found = compare_tokens(hidden, weight, torch.tensor([1, 2, 6]), ReferenceRows(torch.randn(3, 4), weight.detach()))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.divergences.square().sum(), hidden, create_graph=True)
