"""Fused adapter functions equal their definitions, keep what they say, and multiply no more than they must."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lorafocal.ops.elementwise import GEGLU, TORCH
from lorafocal.ops.lora import Adapter, Linear, Norm, Normed, adapted_linear, gated_mlp, gated_mlp_plain, shared_linear
from tests.ops.test_elementwise import random

TOKENS, WIDTH, INNER = 6, 8, 12


class Frozen:
    """A weight that counts how often it is read."""

    def __init__(self, out: int, width: int, seed: int, dtype: torch.dtype) -> None:
        self.matrix, self.reads = random(out, width, seed=seed, dtype=dtype), 0

    def __call__(self, dtype: torch.dtype) -> Tensor:
        self.reads += 1
        return self.matrix.to(dtype)


def layer(out: int, width: int, *, seed: int, rank: int = 3, bias: bool = False, dtype: torch.dtype = torch.float64):
    wide = torch.promote_types(dtype, torch.float32)
    a, b = random(rank, width, seed=seed + 1, dtype=wide), random(out, rank, seed=seed + 2, dtype=wide)
    adapter = Adapter(a.requires_grad_(), b.requires_grad_(), 0.75) if rank else None
    return Linear(Frozen(out, width, seed, dtype), random(out, seed=seed + 3, dtype=dtype) if bias else None, adapter)


def trained(layers: list[Linear]) -> list[Tensor]:
    return [tensor for one in layers if one.adapter for tensor in (one.adapter.a, one.adapter.b)]


def mlp_layers(dtype: torch.dtype = torch.float64, ranks: tuple[int, int, int] = (3, 2, 4)) -> list[Linear]:
    sizes = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    return [layer(*size, seed=10 * i, rank=ranks[i], dtype=dtype) for i, size in enumerate(sizes)]


def gradients(output: Tensor | tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = (output,) if isinstance(output, Tensor) else output
    upstream = [random(*one.shape, seed=99 + i, dtype=one.dtype) for i, one in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream)


def assert_same(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_layers_of_one_input_equal_the_definition_with_biases_and_with_layers_that_have_no_adapter():
    layers = [layer(5, WIDTH, seed=0, bias=True), layer(4, WIDTH, seed=10, rank=0), layer(7, WIDTH, seed=20, rank=1)]
    x = random(TOKENS, WIDTH, seed=50).requires_grad_()
    ours, theirs = shared_linear(x, layers), tuple(adapted_linear(x, one) for one in layers)
    assert_same(ours, theirs)
    inputs = [x, *trained(layers)]
    assert_same(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [TORCH.gated, GEGLU], ids=("swiglu", "geglu"))
@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 0, 2), (3, 0, 0), (0, 0, 0)])
def test_a_gated_mlp_equals_the_definition(ranks, gated, recompute):
    layers, x = mlp_layers(ranks=ranks), random(TOKENS, WIDTH, seed=50).requires_grad_()
    ours, theirs = gated_mlp(x, *layers, gated, recompute=recompute), gated_mlp_plain(x, *layers, gated)
    assert_same((ours,), (theirs,))
    inputs = [x, *trained(layers)]
    assert_same(gradients(ours, inputs), gradients(theirs, inputs))


def test_autograd_s_own_check_passes_through_a_norm_whose_output_is_computed_again():
    layers, norm = mlp_layers(), Norm(random(WIDTH, seed=60), 1e-6, TORCH)

    def block(x: Tensor, *_: Tensor) -> Tensor:
        normed = Normed(x, norm)
        y = norm(x)
        return gated_mlp(y, *layers, TORCH.gated, normed=normed) + shared_linear(y, layers[:1], normed=normed)[0][:, :8]

    assert torch.autograd.gradcheck(block, (random(TOKENS, WIDTH, seed=50).requires_grad_(), *trained(layers)))


def test_an_adapter_at_its_start_leaves_the_base_s_bits():
    for dtype in (torch.float32, torch.bfloat16):
        layers = mlp_layers(dtype)
        for one in layers:
            one.adapter.b.data.zero_()
        bare = [Linear(one.weight, one.bias) for one in layers]
        x = random(TOKENS, WIDTH, seed=50, dtype=dtype)
        assert torch.equal(gated_mlp(x, *layers, TORCH.gated), gated_mlp_plain(x, *bare, TORCH.gated))


def test_bf16_products_have_fp32_gradients_that_are_summed_in_fp32():
    tokens, one = 4099, layer(1, WIDTH, seed=0, rank=1, dtype=torch.bfloat16)
    x = torch.ones(tokens, WIDTH, dtype=torch.bfloat16)
    one.adapter.a.data.fill_(1), one.adapter.b.data.fill_(1)
    (y,) = shared_linear(x, [one])
    to_a, to_b = torch.autograd.grad(y, trained([one]), torch.ones_like(y))
    assert to_a.dtype == to_b.dtype == torch.float32
    assert to_a[0, 0] == tokens * 0.75
    assert to_b[0, 0] == tokens * WIDTH * 0.75


def test_the_dtype_of_the_input_decides_whatever_autocast_says():
    one, x = layer(5, WIDTH, seed=0, dtype=torch.float32), random(TOKENS, WIDTH, seed=1, dtype=torch.float32)
    plain = shared_linear(x, [one])[0]
    with torch.autocast("cpu", torch.bfloat16):
        (under,) = shared_linear(x, [one])
        found = torch.autograd.grad(under.sum(), trained([one]))
    assert torch.equal(under, plain)
    assert_same(found, torch.autograd.grad(plain.sum(), trained([one])))


def kept_elements(call) -> tuple[Counter[torch.dtype], Tensor]:
    """Elements a token that the backward keeps, parameters left out, each storage once."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    kept: Counter[torch.dtype] = Counter()
    for tensor in storages.values():
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            kept[tensor.dtype] += tensor.numel() // TOKENS
    return kept, result


def test_what_is_kept_is_what_the_docstring_says():
    layers, norm = mlp_layers(torch.bfloat16), Norm(random(WIDTH, seed=60, dtype=torch.bfloat16), 1e-6, TORCH)
    x = random(TOKENS, WIDTH, seed=50, dtype=torch.bfloat16).requires_grad_() * 1
    y, rank = norm(x), 3 + 2 + 4
    count = {
        "norm": lambda: norm(x),
        "mlp": lambda: gated_mlp(y, *layers, TORCH.gated),
        "again": lambda: gated_mlp(y, *layers, TORCH.gated, recompute=True),
        "after a norm": lambda: (z := norm(x), gated_mlp(z, *layers, TORCH.gated, normed=Normed(x, norm))),
        "shared": lambda: shared_linear(y, layers[:2]),
    }
    kept = {name: kept_elements(call)[0] for name, call in count.items()}
    assert kept["norm"] == {torch.bfloat16: WIDTH, torch.float32: 1}
    assert kept["mlp"] == {torch.bfloat16: WIDTH + 2 * INNER + rank}
    assert kept["again"] == {torch.bfloat16: WIDTH + rank}
    assert kept["after a norm"] == {torch.bfloat16: WIDTH + 2 * INNER + rank, torch.float32: 1}
    assert kept["shared"] == {torch.bfloat16: WIDTH + 5}
    with torch.no_grad():
        assert not kept_elements(lambda: gated_mlp(y, *layers, TORCH.gated))[0]


class Products(TorchDispatchMode):
    """Multiply-adds of matrix products by whether one factor has a side as short as a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = self.low_rank = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = arguments[-2:]
            sides = (*left.shape, right.shape[1])
            wide = min(sides) >= TOKENS
            self.base, self.low_rank = self.base + wide, self.low_rank + (not wide)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_each_matrix_is_multiplied_once_a_direction_and_read_once_a_pass(recompute):
    layers, x = mlp_layers(), random(TOKENS, WIDTH, seed=50).requires_grad_()
    with Products() as forward:
        y = gated_mlp(x, *layers, TORCH.gated, recompute=recompute)
    assert (forward.base, forward.low_rank) == (3, 5)  # gate and up share x A^T
    assert [one.weight.reads for one in layers] == [1, 1, 1]
    with Products() as backward:
        y.sum().backward()
    again = 2 if recompute else 0
    assert (backward.base, backward.low_rank) == (3 + again, 3 + 2 + 2 + 3 + again)
    assert [one.weight.reads for one in layers] == [2, 2, 2]


class Small(TorchDispatchMode):
    """How often each operation beside products and views was called; each is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        self.calls[name] += not function.is_view and "mm" not in name
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("scales", "scalings"), [((1.0, 1.0, 1.0), 0), ((0.75, 0.75, 0.75), 1 + 3), ((1.0, 2.0, 0.5), 4)]
)
def test_adapters_are_stacked_cast_and_scaled_together(scales, scalings):
    layers = [layer(9, WIDTH, seed=10 * i, dtype=torch.bfloat16) for i in range(3)]
    layers = [replace(one, adapter=replace(one.adapter, scale=s)) for one, s in zip(layers, scales, strict=True)]
    x = random(TOKENS, WIDTH, seed=50, dtype=torch.bfloat16).requires_grad_()
    with Small() as small:
        outputs = shared_linear(x, layers)
    assert small.calls["cat"] == 1
    assert small.calls["_to_copy"] == 1 + 3  # all A, and each B
    with Small() as small:
        torch.autograd.grad(outputs, [x, *trained(layers)], [torch.ones_like(y) for y in outputs])
    assert small.calls["cat"] == 2
    assert small.calls["mul_"] == scalings
    (alone,) = shared_linear(x, layers[:1])
    with Small() as small:
        alone.backward(torch.ones_like(alone))
    assert small.calls["cat"] == 0


def test_the_first_layer_of_a_model_computes_no_gradient_towards_its_input():
    one, x = layer(9, WIDTH, seed=0), random(TOKENS, WIDTH, seed=1)
    (y,) = shared_linear(x, [one])
    y.sum().backward()
    assert one.weight.reads == 1
    assert one.adapter.a.grad is not None


def test_a_step_between_forward_and_backward_is_noticed():
    one, x = layer(9, WIDTH, seed=0), random(TOKENS, WIDTH, seed=1)
    (y,) = shared_linear(x, [one])
    with torch.no_grad():
        one.adapter.b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
