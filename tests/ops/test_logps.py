"""The log-prob head: the chunked operation against its definition, in value and gradient."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorafocal.ops.elementwise import TORCH
from lorafocal.ops.logps import (
    LogitTransform,
    LogProbHead,
    chunks,
    head_fold_,
    set_heads,
    token_collisions_plain,
    token_logps,
    token_logps_plain,
)

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=3.0),
    LogitTransform(2.0, 5.0),
]


def by_chunks(*given):
    """`head_fold_` by another name: on a CPU too it gets chunks of rows, as on a GPU, and not tiles."""
    return head_fold_(*given)


BOTH = pytest.mark.parametrize("fold", [head_fold_, by_chunks], ids=["tiles", "chunks"])


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
@BOTH
def test_chunks_equal_the_definition(transform, with_bias, rows, fold):
    hidden, weight, labels, bias = inputs()
    bias = bias if with_bias else None
    upstream = torch.linspace(-1, 2, 23, dtype=torch.float64)
    results = []
    for operation, more in ((token_logps_plain, {}), (token_logps, {"rows_per_chunk": rows, "fold": fold})):
        leaf = hidden.clone().requires_grad_()
        logps = operation(leaf, weight, labels, bias, transform, **more)
        logps.backward(upstream)
        results.append((logps.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 100])
@BOTH
def test_collisions_are_the_definition_and_change_nothing_beside_them(transform, trained, rows, fold):
    """log sum_v softmax_v^2, whether or not a gradient is wanted; log-probs and gradients stay to the last bit."""
    hidden, weight, labels, bias = inputs()
    expected = token_collisions_plain(hidden, weight, bias, transform)
    torch.testing.assert_close(
        expected, transform(hidden @ weight.T + bias).softmax(-1).square().sum(-1).log(), rtol=1e-12, atol=1e-12
    )
    results = []
    for collisions in (None, torch.full((23,), torch.nan, dtype=torch.float64)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        more = {"rows_per_chunk": rows, "fold": fold, "collisions": collisions}
        logps = token_logps(*leaves, labels, bias, transform, **more)
        logps.sum().backward()
        results.append((logps.detach(), leaves[0].grad, leaves[1].grad))
    for without, beside in zip(*results, strict=True):
        assert (without is None and beside is None) or torch.equal(without, beside)
    torch.testing.assert_close(collisions, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        token_logps(hidden, weight, labels, bias, transform, fold=fold, collisions=collisions.zero_())
    torch.testing.assert_close(collisions, expected, rtol=1e-12, atol=1e-12)


def test_collisions_of_certain_and_of_flat_rows_and_of_many_words():
    """0 where one token is certain, -log V where all are alike; in float32 over a large vocabulary to its rounding."""
    weight, labels = torch.eye(4), torch.tensor([0, 1])
    collisions = torch.empty(2)
    token_logps(torch.tensor([[1e4, 0.0, 0, 0], [0.0, 0, 0, 0]]), weight, labels, collisions=collisions)
    torch.testing.assert_close(collisions, torch.tensor([0.0, -math.log(4)]))
    logits = torch.randn(3, 128_256, generator=torch.Generator().manual_seed(0))
    found = torch.empty(3)
    head_fold_(logits.clone(), torch.zeros(3, dtype=torch.int64), None, LogitTransform(), found)
    exact = 2 * (torch.logsumexp(2 * logits.double(), -1) / 2 - torch.logsumexp(logits.double(), -1))
    assert (found - exact).abs().max() < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
@BOTH
def test_gradients_are_those_of_finite_differences(transform, fold):
    hidden, weight, labels, bias = inputs(5, 4, 7)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: token_logps(h, weight, labels, bias, transform, rows_per_chunk=2, fold=fold), (hidden,)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_trained_head_gets_its_gradients_by_recomputing_chunks(transform):
    hidden, weight, labels, bias = inputs(5, 4, 7)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, labels, b, transform, rows_per_chunk=2), leaves)


@pytest.mark.row("1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@BOTH
def test_a_trained_head_scores_as_the_frozen_one_to_the_last_bit(transform, dtype, fold):
    """A policy whose head is trained must start at exactly its reference, whose head is the same one frozen."""
    hidden, weight, labels, bias = inputs(64, 32, 211, dtype)
    frozen = token_logps(hidden, weight, labels, bias, transform, fold=fold)
    trained = token_logps(hidden, weight.requires_grad_(), labels, bias, transform, fold=fold)
    assert trained.requires_grad
    assert torch.equal(trained, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_low_precision_is_as_exact_as_the_definition_in_the_same_dtype(dtype, fold):
    hidden, weight, labels, _ = inputs(64, 32, 211, dtype)
    exact = token_logps_plain(hidden.double(), weight.double(), labels)
    twin = token_logps_plain(hidden, weight, labels)
    ours = token_logps(hidden, weight, labels, rows_per_chunk=16, fold=fold)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 3 * (twin - exact).abs().max() + 1e-6


@pytest.mark.row("36")
@pytest.mark.parametrize("train_head", [False, True])
@BOTH
def test_no_tensor_of_all_rows_by_the_vocabulary_is_ever_made(train_head, fold):
    """Every operation of forward and backward is watched: none yields more than a chunk of logits."""
    hidden, weight, labels, _ = inputs(64, 8, 301, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // 4)
            return out

    with Watch():
        token_logps(hidden, weight, labels, rows_per_chunk=16, fold=fold).sum().backward()
    assert 301 * 8 < largest <= 301 * 16


class LiveLogits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts rows of a vocabulary alive at a time, by storage: what is computed in place counts once."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight = len(weight), weight.untyped_storage()._cdata
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                storage, rows = tensor.untyped_storage(), tensor.numel() // self.vocabulary
                if storage._cdata != self.weight:  # seen from its other side
                    self.alive[storage._cdata] = (weakref.ref(storage), rows)
        self.alive = {key: (ref, rows) for key, (ref, rows) in self.alive.items() if ref() is not None}
        self.peak = max(self.peak, sum(rows for _, rows in self.alive.values()))
        return out


@pytest.mark.row("36")
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("colliding", [False, True])
@pytest.mark.parametrize(("softcap", "chunks"), [(None, 1), (3.0, 2)])
def test_one_chunk_of_logits_is_alive_at_a_time(train_head, softcap, chunks, colliding):
    """The error takes the logits' place, and a chunk is gone before the next is made; a soft-cap keeps its slope."""
    hidden, weight, labels, _ = inputs(64, 8, 301, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    more = {"rows_per_chunk": 16, "fold": by_chunks, "collisions": torch.empty(64) if colliding else None}
    with LiveLogits(weight) as live:
        token_logps(hidden, weight, labels, None, LogitTransform(softcap=softcap), **more).sum().backward()
    assert live.peak == 16 * chunks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_fold_is_the_log_softmax_and_its_gradient(transform, dtype):
    """Towards the logits as the head makes them; rounded to `dtype` only then, and not made where none is asked for."""
    logits = torch.randn(5, 31, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (5,))
    expected = transform(logits).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    expected.sum().backward()
    logps, error, factor = head_fold_(logits.detach().clone(), labels, dtype, transform)
    torch.testing.assert_close(logps, expected.detach(), rtol=1e-12, atol=1e-12)
    assert error.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(error.double() * factor, logits.grad, rtol=step, atol=1e-12)
    alone = head_fold_(logits.detach().clone(), labels, None, transform)
    assert torch.equal(alone.logps, logps)
    assert alone.error is None


def test_chunks_are_even():
    """17 rows in chunks of at most 16 are 9 and 8: a product of a single row would cost as much as one of many."""
    hidden, weight, labels, _ = inputs(17, 4, 7)
    sizes = []

    def counted(logits, *rest):
        sizes.append(len(logits))
        return head_fold_(logits, *rest)

    token_logps(hidden, weight, labels, rows_per_chunk=16, fold=counted)
    assert sizes == [9, 8]
    assert token_logps(hidden[:0], weight, labels[:0], fold=counted).shape == (0,)


@pytest.mark.newest
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("train_head", [False, True])
@BOTH
def test_trl_computes_the_same(transform, train_head, fold):
    """Its chunked function: same log-probs and gradients, the frozen head's without our second look at the logits."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, labels, _ = inputs(40, 16, 97, torch.float32)
    upstream = torch.linspace(-1, 2, 40)
    results = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(train_head)]
        if ours:
            logps = token_logps(*leaves, labels, None, transform, rows_per_chunk=16, fold=fold)
        else:
            given = (*leaves, None, labels, 1.0, 32, transform.softcap, transform.scale, ())
            logps = ChunkedLogProbFunction.apply(*given)[0]
        logps.backward(upstream)
        results.append((logps.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]))
    assert len(results[0]) == 2 + train_head
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


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
@BOTH
def test_autocast_does_not_make_the_log_probs_coarse(fold):
    """Under bf16 autocast a plain head returns bf16: 0.04 nats a token off, and the sums of a run stick."""
    layer = head(torch.bfloat16)
    layer.fold = fold
    hidden = (torch.randn(1, 64, 8) * 3).bfloat16().requires_grad_()
    layer.labels = torch.arange(64) % 31
    exact = token_logps_plain(hidden[0].double(), layer.weight.double(), layer.labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(hidden)[0]
        ours.sum().backward()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5
    assert hidden.grad.isfinite().all()


def test_the_chosen_functions_fold_the_heads_logits():
    """Every head of a model, and asked for an error only where a gradient is wanted."""
    asked = []

    def noted(logits, labels, dtype, transform, collisions):
        asked.append(dtype)
        return head_fold_(logits, labels, dtype, transform, collisions)

    model, hidden = nn.Sequential(nn.Linear(8, 8), head()), torch.randn(1, 3, 8)
    model[1].labels = torch.tensor([0, 1, 2])
    expected = model(hidden)
    set_heads(model, replace(TORCH, head_fold_=noted))
    torch.testing.assert_close(model(hidden), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(hidden), expected)
    assert asked == [torch.float32, None]
    set_heads(model, replace(TORCH, head_fold_=noted), 2)
    torch.testing.assert_close(model(hidden), expected)
    assert asked[2:] == [torch.float32] * 2  # so many rows at a time


@pytest.mark.row("36")
@pytest.mark.parametrize(("total", "rows", "most"), [(1100, 523, 384), (13000, 523, 512), (300, 2048, 384), (50, 7, 7)])
def test_chunks_are_even_but_for_whole_tiles_of_rows(total, rows, most):
    sizes = [at.stop - at.start for at in chunks(torch.empty(total, 1), rows)]
    assert (sum(sizes), max(sizes)) == (total, min(total, most))
    assert len(sizes) == -(-total // (rows // 128 * 128 or rows))  # no more than there must be
    tile = 128 if rows >= 128 else 1
    assert all(size % tile == 0 for size in sizes[:-1])
    assert not list(chunks(torch.empty(0, 1), rows))


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_derivative_is_refused(trained):
    """What the head keeps for its backward has no graph: terms would be missing without a word."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=trained)
    logps = token_logps(hidden, weight, torch.tensor([1, 2, 6]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
