"""Bytes of activations: the arithmetic against what autograd was seen to keep, and against traced allocations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorafocal.data.packing import Pack, PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.memory import (
    Lengths,
    Setup,
    Shape,
    activation_bytes_per_token,
    cast_bytes,
    pack_bytes,
)
from lorafocal.model.adapters import attach_lora
from lorafocal.model.fused import fuse
from lorafocal.model.load import load_base
from lorafocal.model.master import hold_masters, train_in_full
from lorafocal.ops import attention, logps
from lorafocal.ops.attention_kernels import Kernel, KernelChoice
from lorafocal.ops.divergences import ReferenceRows
from lorafocal.policy import compared_tokens, of_pairs, prepare_policy, reference_rows, sequence_logps, sums_of
from tests.tiny import lora

pytestmark = pytest.mark.slow

AT = Lengths(60, 70, 50)  # longer than what attends in one call a pair
TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MID = TINY | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 48}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _a_call_a_segment(monkeypatch):
    """As on a GPU, which the arithmetic is for: blocks of rows keep less."""
    monkeypatch.setattr(attention, "ROW_BLOCKS", None)


def pack(count: int = 2) -> Pack:
    sizes = (int(AT.prompt), int(AT.chosen), int(AT.rejected))
    pairs = [TokenizedPair(str(i), *([2 + i + j] * size for j, size in enumerate(sizes))) for i in range(count)]
    (only,) = PairCollator("packed", 1 << 16)(pairs).packs
    return only


def shape_of(family: str, sizes: dict[str, Any]) -> tuple[Any, Shape]:
    config = CONFIG_MAPPING[family](**sizes)
    return config, Shape.of(config.to_dict())


def prepared(base: nn.Module, setup: Setup, tier: str) -> Any:
    """A policy as `setup` and `tier` have it."""
    if setup.full:
        policy = trained_in_full(base, setup)
    else:
        policy = adapted(base, setup, tier)
    if tier == "full":
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train()


def trained_in_full(base: nn.Module, setup: Setup) -> nn.Module:
    prepare_policy(base)
    trained = train_in_full(base)
    if setup.widened:
        hold_masters(base, trained)
    return base


def adapted(base: nn.Module, setup: Setup, tier: str) -> PeftModel:
    adapter = {"target_modules": setup.targets, "lora_dropout": setup.dropout, "use_dora": setup.use_dora}
    saved = list(setup.modules_to_save) or None
    policy = attach_lora(base.requires_grad_(False), lora(r=setup.r, modules_to_save=saved, **adapter))
    prepare_policy(policy)
    if setup.adapter_kernels == "fused":
        fuse(policy, recompute="mlp" if tier == "mlp" else "none")
    return policy


def saved_bytes(policy: nn.Module, rows: Pack, *, divergences: bool = False) -> int:
    """Every storage that the forward saves for its backward, once, but those that the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not come back while we count

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    before = reference_rows(policy, rows) if divergences else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(policy, rows, before)
    assert loss.requires_grad
    return sum(sizes.values())


def loss_of(policy: nn.Module, rows: Pack, before: ReferenceRows | None) -> Tensor:
    """A made-up loss of log-probs, and of divergences from rows of `before`."""
    if before is None:
        logps = sequence_logps(policy, rows)
        return (logps.chosen - logps.rejected).sum()
    compared = compared_tokens(policy, rows, before)
    logps = of_pairs(sums_of(compared.logps, rows), rows)
    return (logps.chosen - logps.rejected).sum() + sums_of(compared.divergences, rows).sum()


def check(family: str, sizes: dict[str, Any], setup: Setup, tier: str, *, within: float = 0.05) -> None:
    config, shape = shape_of(family, sizes)
    base = AutoModelForCausalLM.from_config(config).to(DTYPES[setup.dtype])
    counted = saved_bytes(prepared(base, setup, tier), rows := pack(), divergences=setup.divergences)
    planned = rows.num_rows * activation_bytes_per_token(shape, setup, tier)
    if not (setup.full and tier == "full"):  # casts are alive until the forward ends, but not saved
        planned += cast_bytes(shape, setup, tier)
    assert planned == pytest.approx(counted, rel=within)


def setup(**more: Any) -> Setup:
    return Setup(**({"r": 4, "dtype": "float32", "attention": "sdpa", "lengths": AT} | more))


# --- against saved tensors ------------------------------------------------------------------------------------------


@pytest.mark.row("37")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_a_forward_keeps_is_counted(family, kernels, dtype):
    check(family, TINY, setup(dtype=dtype, adapter_kernels=kernels), "none")


@pytest.mark.row("37")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_what_is_kept_with_gate_and_up_computed_again(family):
    check(family, TINY, setup(), "mlp")


@pytest.mark.row("37")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["fused", "peft"])
def test_what_is_kept_with_every_layer_computed_again(kernels, dtype):
    check("llama", TINY, setup(dtype=dtype, adapter_kernels=kernels), "full")


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("family", "kernels", "tier"),
    [
        *(("llama", kernels, tier) for kernels, tier in (("fused", "mlp"), ("peft", "none"), ("fused", "full"))),
        *((family, "fused", "none") for family in ("llama", "mistral", "qwen3", "gemma")),
    ],
)
def test_middle_sized_shapes(family, kernels, tier):
    check(family, MID, setup(r=16, adapter_kernels=kernels), tier, within=0.01)


# Weights in the arithmetic's own dtype, as in fp32 and under DeepSpeed and FSDP2, or fp32 masters under autocast.
IN_FULL = [("float32", "one-process"), ("bfloat16", "zero3"), ("bfloat16", "one-process")]


@pytest.mark.row("37")
@pytest.mark.parametrize("tier", ["none", "full"])
@pytest.mark.parametrize(("dtype", "engine"), IN_FULL)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_where_every_weight_is_trained(family, dtype, engine, tier):
    check(family, TINY, setup(full=True, dtype=dtype, engine=engine), tier, within=0.01)


@pytest.mark.row("37")
@pytest.mark.parametrize("tier", ["none", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_what_is_kept_where_whole_distributions_are_compared(dtype, full, tier):
    more = {"full": True, "engine": "zero3"} if full else {}
    check("llama", TINY, setup(dtype=dtype, divergences=True, **more), tier, within=0.02)


@pytest.mark.row("37")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "adapter",
    [
        {"targets": ["q_proj", "v_proj"]},
        {"use_dora": True},
        {"dropout": 0.1},
        {"targets": ["q_proj", "down_proj"], "modules_to_save": ["o_proj"]},
    ],
    ids=str,
)
def test_other_adapters(adapter, dtype):
    check("llama", TINY, setup(adapter_kernels="peft", dtype=dtype, **adapter), "none")


@pytest.mark.row("37")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_matrices_keep_what_float_ones_do(tmp_path, quantization):
    config, shape = shape_of("llama", TINY | {"hidden_size": 64, "head_dim": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for kernels in ("fused", "peft"):
        asked = setup(quantization=quantization, adapter_kernels=kernels)
        base = load_base(str(tmp_path), dtype="float32", quantization=quantization)
        counted = saved_bytes(prepared(base, asked, "none"), rows := pack())
        falls_back = kernels == "fused" and quantization == "int8"
        counted_as = setup(adapter_kernels="peft") if falls_back else asked
        assert rows.num_rows * activation_bytes_per_token(shape, counted_as, "none") == pytest.approx(counted, rel=0.05)


class OneCall(torch.autograd.Function):
    """Stands for a GPU's variable-length kernel: keeps what that keeps."""

    @staticmethod
    def forward(ctx, query, key, value):  # type: ignore[no-untyped-def]
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_zeros(query.shape[:2], dtype=torch.float32))
        return out


@pytest.mark.row("37")
@pytest.mark.parametrize(("kernels", "tier"), [("fused", "none"), ("fused", "mlp"), ("peft", "none")])
def test_one_call_of_a_variable_length_kernel_keeps_less(monkeypatch, kernels, tier):
    def one_call(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        return OneCall.apply(query, key, value)

    class Called(Kernel):
        def __call__(self, query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **options: Any) -> Tensor:
            return self.function(query, key, value, *bounds[:2])

    choice = KernelChoice("one call", Called("one call", one_call), "")
    monkeypatch.setattr(attention, "choose", lambda *args, **options: choice)
    asked = setup(dtype="bfloat16", attention="flash", adapter_kernels=kernels)
    check("llama", TINY, asked, tier)
    for engine in ("zero3", "one-process") if tier == "none" else ():
        in_full = setup(dtype="bfloat16", attention="flash", full=True, engine=engine)
        check("llama", TINY, in_full, tier, within=0.01)


# --- against the peak of allocations --------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that was allocated at once while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def planned_peak(shape: Shape, asked: Setup, tier: str, tokens: int, answers: int) -> float:
    """The plan's, with the head's chunk as small as these rows make it."""
    return pack_bytes(shape, replace(asked, head_rows=min(answers, 2**26 // shape.vocab_size)), tier, tokens)


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("kernels", "tier"), [("fused", "none"), ("fused", "mlp"), ("fused", "full"), ("peft", "none"), ("peft", "full")]
)
def test_the_peak_of_a_pack_is_the_plans(kernels, tier):
    check_peak(setup(r=4, adapter_kernels=kernels), tier)


@pytest.mark.row("37")
@pytest.mark.parametrize("tier", ["none", "full"])
def test_the_peak_of_a_pack_is_the_plans_where_every_weight_is_trained(tier):
    check_peak(setup(full=True), tier)


@pytest.mark.row("37")
@pytest.mark.parametrize("full", [False, True])
def test_the_peak_of_a_pack_is_the_plans_where_whole_distributions_are_compared(full):
    check_peak(setup(full=full, divergences=True), "none")


@pytest.mark.row("37")
@pytest.mark.parametrize("tier", ["none", "mlp", "full"])
def test_the_peak_of_a_pack_is_in_the_head_where_its_chunk_outweighs_a_layers_backward(tier, monkeypatch):
    monkeypatch.setattr(logps, "takes_tiles", lambda *_: False)  # as on a GPU
    check_peak(setup(r=4), tier, MID | {"vocab_size": 8192})


def check_peak(asked: Setup, tier: str, sizes: dict[str, Any] = MID) -> None:
    config, shape = shape_of("llama", sizes)
    policy = prepared(AutoModelForCausalLM.from_config(config), asked, tier)
    rows = pack()

    def step() -> None:
        loss_of(policy, rows, reference_rows(policy, rows) if asked.divergences else None).backward()

    step()  # gradients are there from now on
    planned = planned_peak(shape, asked, tier, rows.num_rows, int(rows.index.lengths.sum()))
    assert planned == pytest.approx(peak_bytes(step), rel=0.1)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@contextmanager
def on_gpu(policy: nn.Module) -> Iterator[Callable[[], int]]:
    """Within, a call tells the most bytes allocated since the beginning, beside what was there then."""
    gc.collect()  # an earlier test's policy is held by cycles: freed within, it would be missing from the peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.row("37")
@pytest.mark.parametrize("pairs", [8, 32])
@pytest.mark.parametrize(
    ("kernels", "tier"), [("fused", "none"), ("fused", "mlp"), ("fused", "full"), ("peft", "none")]
)
def test_the_peak_on_a_gpu_is_the_plans(kernels, tier, pairs):
    sizes = TINY | {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
        "num_attention_heads": 8, "head_dim": 128,
    }  # fmt: skip
    config, shape = shape_of("llama", sizes)
    asked = setup(r=16, dtype="bfloat16", attention="flash", adapter_kernels=kernels)
    policy = prepared(AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16), asked, tier)
    on_host = pack(pairs)
    rows, scored = on_host.to(torch.device("cuda")), int(on_host.index.lengths.sum())

    def step() -> None:
        logps = sequence_logps(policy, rows)
        (logps.chosen - logps.rejected).sum().backward()

    step()
    with on_gpu(policy) as peak:
        step()
        planned = planned_peak(shape, asked, tier, rows.num_rows, scored)
        assert planned == pytest.approx(peak(), rel=0.1)
