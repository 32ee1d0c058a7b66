"""The head in tiles of the vocabulary: whatever the tiles, the definition; and no more than one of them alive.

`test_logps.py` runs its own tests through tiles and chunks alike; here are the tiles' own corners.
"""

from __future__ import annotations

import weakref

import pytest
import torch

from lorafocal.ops.logps import LogitTransform, token_logps, token_logps_plain
from lorafocal.ops.tiled_head import WIDTH, TiledHead
from tests.ops.test_logps import TRANSFORMS, by_chunks, inputs


def both(hidden, weight, labels, bias=None, transform=TRANSFORMS[0], *, width):
    """(log-probs, gradients) by the definition, then in tiles of so many tokens."""
    leaf = hidden.clone().requires_grad_()
    plain = token_logps_plain(leaf, weight, labels, bias, transform)
    plain.sum().backward()
    head = TiledHead(weight, bias, transform, plain.dtype, width)
    return (plain.detach(), leaf.grad), head.score(hidden, labels, None, differentiated=True)


@pytest.mark.row("36")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("width", [1, 5, 64, 156, 157, 1000])
def test_whatever_the_tiles_the_result_is_the_definition(transform, width):
    """Tiles of one token, of some that do not divide the vocabulary, of all but one, of all."""
    hidden, weight, labels, bias = inputs(23, 9, 157)
    expected, found = both(hidden, weight, labels, bias, transform, width=width)
    alone, _ = TiledHead(weight, bias, transform, torch.float64, width).score(
        hidden, labels, None, differentiated=False
    )
    assert torch.equal(alone, found[0])  # the reference's, which must be the policy's at the start
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_tiles_far_above_and_below_each_other_are_carried_over(order):
    """Logits from -5000 to 5000, tile by tile: without a common top they would overflow, with the first's vanish."""
    hidden, weight, labels, _ = inputs(6, 4, 20)
    bias = torch.linspace(-5000, 5000, 20, dtype=torch.float64)
    bias = bias if order == "rising" else bias.flip(0)
    labels = torch.tensor([0, 5, 10, 18, 19, 19])
    expected, found = both(hidden, weight, labels, bias, width=3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_tokens_that_are_never_drawn_may_fill_a_tile():
    """A bias of -inf, as of a vocabulary padded to a round size: the first tile and the last hold nothing else."""
    hidden, weight, labels, bias = inputs(6, 4, 20)
    bias[:4] = bias[15:] = -torch.inf
    labels = labels.clamp(4, 14)
    expected, found = both(hidden, weight, labels, bias, width=3)
    assert found[0].isfinite().all()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("far", [0.0, 4.0, 12.0])
def test_in_float32_tiles_are_as_exact_as_chunks(far):
    """Also of labels that are all but certain, whose gradient is what two like numbers leave of each other."""
    hidden, weight, labels, _ = inputs(64, 32, 4001, torch.float32)
    weight /= 32**0.5
    hidden += far * weight[labels]
    exact = hidden.double().requires_grad_()
    logps = token_logps_plain(exact, weight.double(), labels)
    logps.sum().backward()
    errors = []
    for fold in (None, by_chunks):
        leaf = hidden.clone().requires_grad_()
        found = token_logps(leaf, weight, labels, rows_per_chunk=16, **({} if fold is None else {"fold": fold}))
        found.sum().backward()
        errors.append(((found - logps).abs().max(), (leaf.grad - exact.grad).abs().max()))
        assert found.max() <= 0
    for tiles, chunks in zip(*errors, strict=True):
        assert tiles <= 3 * chunks + 1e-6


@pytest.mark.parametrize("label", [-1, 31])
def test_a_label_that_the_head_has_not_is_refused(label):
    """No tile has it, and its log-prob would be of no token; said as of chunks, without a look at the labels."""
    hidden, weight, labels, _ = inputs()
    labels[3] = label
    for more in ({}, {"fold": by_chunks}):
        with pytest.raises(RuntimeError, match=f"index {label} is out of bounds for dimension 1 with size 31"):
            token_logps(hidden, weight, labels, **more)


@pytest.mark.row("36")
@pytest.mark.parametrize(("softcap", "tiles"), [(None, 1), (3.0, 2)])
def test_one_tile_is_alive_at_a_time(softcap, tiles):
    """Its memory is that of the next one; a soft-cap keeps its slope beside it."""
    hidden, weight, labels, _ = inputs(64, 8, 4001, torch.float32)
    width = 128
    alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
    peak = made = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal alive, peak, made
            out = function(*args, **(kwargs or {}))
            for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out)):
                storage = tensor.untyped_storage()
                if storage.nbytes() == 64 * width * 4:
                    made += storage._cdata not in alive
                    alive[storage._cdata] = weakref.ref(storage)
            alive = {key: ref for key, ref in alive.items() if ref() is not None}
            peak = max(peak, len(alive))
            return out

    head = TiledHead(weight, None, LogitTransform(softcap=softcap), torch.float32, width)
    with Watch():
        head.score(hidden, labels, None, differentiated=True)
    assert peak == tiles
    if softcap is None:
        assert made == 1


def test_a_head_in_half_precision_is_never_widened_as_a_whole():
    hidden, weight, labels, _ = inputs(63, 8, 4001, torch.bfloat16)
    widest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal widest
            out = function(*args, **(kwargs or {}))
            for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out)):
                if tensor.dtype == torch.float32 and tensor.shape[-1:] == (8,) and len(tensor) != 63:
                    widest = max(widest, len(tensor))
            return out

    with Watch():
        token_logps(hidden.requires_grad_(), weight, labels)
    assert widest == WIDTH


def test_a_row_is_scored_alike_whatever_stands_beside_it():
    """To the last bit, also in several rounds of rows: packs of other pairs must not change a pair's numbers."""
    hidden, weight, labels, _ = inputs(300, 16, 1300, torch.float32)
    whole = token_logps(hidden, weight, labels)
    rounds = token_logps(hidden, weight, labels, rows_per_chunk=64)
    some = token_logps(hidden[:128], weight, labels[:128])
    assert torch.equal(rounds, whole)
    assert torch.equal(some, whole[:128])
