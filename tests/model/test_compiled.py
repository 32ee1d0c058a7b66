"""Compiled decoder layers: one graph a bucket whatever the pack, no breaks, the same values and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from lorafocal.data.packing import Pack, PairCollator
from lorafocal.errors import InputError
from lorafocal.model import compiled
from lorafocal.model.compiled import compile_layers, decoder_layers, is_compiled, restore_layers
from lorafocal.model.fused import fuse
from lorafocal.ops import lora, trace_check
from lorafocal.policy import evaluating, plain_attention, prepare_policy, sequence_logps
from lorafocal.probes import check_packing
from tests.tiny import SIZES, pairs, tiny_policy

BUCKET = 64


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def policy_for_packs(kind: str = "llama", **more) -> nn.Module:
    policy = tiny_policy(kind, **more)
    prepare_policy(policy)
    return policy


def packs(rows: int, *, count: int, seed: int = 1) -> tuple[Pack, ...]:
    """Packs whose rows are multiples of the bucket, of pairs that differ with the seed."""
    return PairCollator(tokens_per_pack=rows, bucket=BUCKET)(pairs(count, seed=seed)).packs


def values_and_gradients(policy: nn.Module, pack: Pack) -> list[Tensor]:
    policy.zero_grad()
    logps = sequence_logps(policy, pack)
    (logps.chosen - logps.rejected).sum().backward()
    return [logps.chosen.detach(), logps.rejected.detach()] + [
        p.grad.clone() for p in policy.parameters() if p.grad is not None
    ]


@pytest.mark.engine
@pytest.mark.row("F16")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packs_of_any_composition_make_one_graph_a_bucket_and_no_breaks(kind, monkeypatch):
    """The first layer's input needs no gradient, so it has a graph of its own; all other layers share one."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 4)
    policy = policy_for_packs(kind)
    one_length = [pack for seed in range(3) for pack in packs(64, count=6, seed=seed) if pack.num_rows == BUCKET]
    assert len({pack.segments.spans for pack in one_length}) > 3
    graphs = CompileCounterWithBackend("eager")
    assert compile_layers(policy, BUCKET, backend=graphs) is None
    for pack in one_length:
        values_and_gradients(policy, pack)
    assert graphs.frame_count == 2
    [longer, *_] = [pack for pack in packs(128, count=9) if pack.num_rows == 2 * BUCKET]
    values_and_gradients(policy, longer)
    assert graphs.frame_count == 4
    assert not counters["graph_break"]


@pytest.mark.engine
@pytest.mark.row("F16")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_compiled_layers_equal_plain_ones_in_value_and_gradient(kind):
    """Policy and live reference, through the graph of forward and backward."""
    tolerance = 1e-12
    policy = policy_for_packs(kind, dtype=torch.float64)
    batch = packs(128, count=12)
    plain = [values_and_gradients(policy, pack) for pack in batch]
    with torch.no_grad(), policy.disable_adapter():
        base = [sequence_logps(policy, pack).chosen for pack in batch]
    assert compile_layers(policy, BUCKET, backend="aot_eager") is None
    for pack, wanted, reference in zip(batch, plain, base, strict=True):
        for a, b in zip(values_and_gradients(policy, pack), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        with torch.no_grad(), policy.disable_adapter():
            torch.testing.assert_close(sequence_logps(policy, pack).chosen, reference, rtol=tolerance, atol=tolerance)
    assert not counters["graph_break"]


@pytest.mark.engine
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_fused_adapters_compile_without_breaks_and_equal_plain_layers(recompute):
    policy = policy_for_packs(dtype=torch.float64)
    [pack, *_] = packs(128, count=9)
    wanted = values_and_gradients(policy, pack)
    fuse(policy, recompute=recompute)
    graphs = CompileCounterWithBackend("aot_eager")
    assert compile_layers(policy, BUCKET, backend=graphs) is None
    for a, b in zip(values_and_gradients(policy, pack), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert graphs.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.engine
def test_under_ddp_a_layer_is_one_graph_too(monkeypatch):
    """By itself torch cuts it where a bucket is full, the first of which holds a MiB."""
    within = SimpleNamespace(bucket_bytes_cap=1)  # what DDP leaves there during its forward
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", within)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    policy = policy_for_packs(dtype=torch.float64)
    [pack, *_] = packs(128, count=9)
    fuse(policy)
    wanted = values_and_gradients(policy, pack)
    graphs = CompileCounterWithBackend("aot_eager")
    assert compile_layers(policy, BUCKET, backend=graphs) is None
    for a, b in zip(values_and_gradients(policy, pack), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert graphs.frame_count == 2


@pytest.mark.engine
@pytest.mark.row("F16")
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_fused_functions_that_a_compiler_gets_wrong_are_refused_and_other_models_are_not_tried(recompute, monkeypatch):
    """Gradients that are lost in what is traced alone, as torch 2.11 lost them."""
    product = lora.wide_product

    def lost(left: Tensor, right: Tensor) -> Tensor:
        found = product(left, right)
        return torch.zeros_like(found) if torch.compiler.is_compiling() else found

    monkeypatch.setattr(lora, "wide_product", lost)
    for check in (trace_check.traced_linears, trace_check.traced_mlp):
        monkeypatch.setattr(compiled, check.__name__, check.__wrapped__)  # which remembers nothing
    policy = policy_for_packs(dtype=torch.float64)
    assert compile_layers(policy, BUCKET, backend="eager") is None
    restore_layers(policy)
    fuse(policy, recompute=recompute)
    with pytest.raises(InputError, match=r"kernels\.compile: torch .* off by 1\).* kernels\.compile: false"):
        compile_layers(policy, BUCKET, backend="eager")
    assert not is_compiled(policy)


@pytest.mark.row("F16")
@pytest.mark.parametrize(("linears", "mlp"), [(0.0, math.nan), (math.nan, 0.0)])
def test_fused_functions_that_are_no_numbers_when_compiled_are_refused(linears, mlp, monkeypatch):
    monkeypatch.setattr(compiled, "traced_linears", lambda *_: linears)
    monkeypatch.setattr(compiled, "traced_mlp", lambda *_: mlp)
    policy = policy_for_packs()
    fuse(policy, recompute="none")
    with pytest.raises(InputError, match="off by nan"):
        compile_layers(policy, BUCKET, backend="eager")


@pytest.mark.row("F16")
def test_a_torch_that_cannot_compile_fused_functions_is_told_with_the_way_out(monkeypatch):
    """As torch 2.9, whose own check of the graph fails."""

    def fails(*_: object) -> float:
        raise torch._dynamo.exc.TorchDynamoException("a graph with fill_")

    monkeypatch.setattr(compiled, "traced_linears", fails)
    policy = policy_for_packs()
    fuse(policy, recompute="none")
    with pytest.raises(InputError, match=r"kernels\.compile: torch .* cannot compile fused .* kernels\.compile: false"):
        compile_layers(policy, BUCKET, backend="eager")
    assert not is_compiled(policy)


@pytest.mark.engine
def test_layers_that_are_computed_again_compile_too():
    policy = policy_for_packs(dtype=torch.float64)
    [pack, *_] = packs(128, count=9)
    wanted = values_and_gradients(policy, pack)
    policy.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    assert compile_layers(policy, BUCKET, backend="aot_eager") is None
    for a, b in zip(values_and_gradients(policy, pack), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not counters["graph_break"]


def test_other_rows_run_uncompiled():
    """The probes, a pack that was not filled up, one plain sequence; and each still computes what it did."""
    policy = policy_for_packs()
    [odd] = PairCollator(tokens_per_pack=64)(pairs(3)).packs
    wanted = values_and_gradients(policy, odd)
    graphs = CompileCounterWithBackend("eager")
    compile_layers(policy, BUCKET, backend=graphs)
    check_packing(policy)
    for a, b in zip(values_and_gradients(policy, odd), wanted, strict=True):
        assert torch.equal(a, b)
    with evaluating(policy), plain_attention(policy), torch.no_grad():
        policy.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=2, do_sample=False)
    assert graphs.frame_count == 0


def test_layers_are_compiled_once_and_restored_whole():
    policy = policy_for_packs()
    assert compile_layers(policy, BUCKET, backend="eager") is None
    assert "exchanged already" in compile_layers(policy, BUCKET, backend="eager")
    restore_layers(policy)
    assert all("forward" not in vars(layer) for layer in decoder_layers(policy))
    assert compile_layers(policy, BUCKET, backend="eager") is None


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(InputError, match="a bucket of 1"):
        compile_layers(policy_for_packs(), 1)
    assert "no decoder layers" in compile_layers(nn.Linear(2, 2), BUCKET)


@pytest.mark.parametrize("tokens", [1, 256, 2048, 8192, 16_384, 100_000])
def test_compiled_layers_have_graphs_for_all_lengths_of_packs(tokens):
    """For each length one of the reference, one of the policy, one of the first layer; past the limit none is made."""
    bucket = compiled.bucket_of(tokens)
    assert 3 * -(-tokens // bucket) <= compiled.MOST_GRAPHS
    assert bucket % compiled.BUCKET == 0
