"""Token budget and tier: what is stated wins; the rest follows from the device's memory; every choice is told."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from lorafocal import assembly, budget, memory
from lorafocal.arguments import FocalPOConfig
from lorafocal.assembly import assemble_kernels
from lorafocal.budget import settle_budget, setup_of
from lorafocal.errors import InputError
from lorafocal.memory import Shape
from lorafocal.model.adapters import attach_lora
from lorafocal.ops.attention_kernels import KernelChoice
from lorafocal.ops.logps import LogProbHead
from tests.model.families import text_policy
from tests.tiny import lora, pairs, tiny_base, tiny_policy, trainer

pytestmark = pytest.mark.slow

DATA = pairs(12)
LONGEST = max(pair.shared_length for pair in DATA)
ROWS = 2**26 // 97 // 128 * 128  # of a chunk of the tiny model's logits, where there is memory
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def arguments(tmp_path, **settings: Any) -> FocalPOConfig:
    return FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.fixture
def gpu_with(monkeypatch):
    """A GPU of which so many bytes are free, and which has many more; packs attend there in one call, or in several."""

    def of(free: float, share: float = 1.0, *, kernel: str | None = "one call") -> None:
        monkeypatch.setattr(budget, "choose", lambda *given, **named: KernelChoice("", kernel, ""))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, max(2e12, 2 * free)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)

    return of


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_stated_wins(tmp_path, gpu_with, device):
    gpu_with(1e12)
    args = arguments(tmp_path, tokens_per_pack=123, recompute="full")
    rows = None if device == CPU else ROWS
    expected = memory.Choice(123, "full", "as stated", head_rows=rows)
    assert settle_budget(tiny_policy(), args, device, DATA) == expected
    stated = settle_budget(tiny_policy(), arguments(tmp_path, tokens_per_pack=123), device, DATA)
    assert (stated.tokens, stated.tier) == (123, "none")
    tier = settle_budget(tiny_policy(), arguments(tmp_path, recompute="mlp"), device, DATA)
    assert (tier.tokens >= 2048, tier.tier) == (True, "mlp")


def test_on_a_cpu_packs_are_of_2048_tokens_or_the_longest_pair(tmp_path):
    assert settle_budget(tiny_policy(), arguments(tmp_path), CPU, DATA).tokens == 2048
    long = replace(DATA[0], prompt_ids=[1] * 3000)
    choice = settle_budget(tiny_policy(), arguments(tmp_path), CPU, [long])
    assert choice.tokens == long.shared_length
    padded = settle_budget(tiny_policy(), arguments(tmp_path, layout="padded"), CPU, [long])
    assert padded.tokens == 2 * long.longest


def test_on_a_gpu_the_budget_is_what_fits_and_a_tighter_one_recomputes(tmp_path, gpu_with):
    policy, args = tiny_policy(), arguments(tmp_path)
    shape = Shape.of(policy.get_base_model().config.to_dict())
    setup = replace(setup_of(policy, args, DATA, fused=True), head_rows=ROWS)
    held = memory.gradient_bytes(shape, setup) + memory.optimizer_bytes(shape, setup, on_gpu=True)

    def chosen(free: float) -> memory.Choice:
        gpu_with((free + held) / (1 - memory.SLACK))
        return settle_budget(policy, args, CUDA, DATA)

    assert chosen(1e12).tokens == memory.MAX_TOKENS
    tiers = []
    for tokens in (64, 256, 1024):
        needed = memory.pack_bytes(shape, setup, "none", tokens)
        choice = chosen(needed + 1)
        tiers.append(choice.tier)
        assert choice.tokens >= tokens
        assert memory.pack_bytes(shape, setup, choice.tier, choice.tokens) <= needed + 2
    assert choice.reason
    without = settle_budget(policy, args, CUDA, DATA, fused=False)
    assert without.tier != "mlp"


def test_without_a_variable_length_kernel_on_a_gpu_fewer_rows_are_taken_to_fit_on_all(tmp_path, gpu_with, monkeypatch):
    policy, args = tiny_policy(dtype=torch.bfloat16), arguments(tmp_path, recompute="none")
    shape = Shape.of(policy.get_base_model().config.to_dict())
    setup = replace(setup_of(policy, args, DATA, fused=True), head_rows=ROWS)
    held = memory.gradient_bytes(shape, setup) + memory.optimizer_bytes(shape, setup, on_gpu=True)
    free = (memory.pack_bytes(shape, setup, "none", 4096) + held + 1) / (1 - memory.SLACK)
    rows = []
    for kernel, others in ((None, False), ("one call", True), ("one call", False)):
        gpu_with(free, kernel=kernel)
        monkeypatch.setattr(budget, "anywhere", lambda flag, device, others=others: flag or others)
        rows.append(settle_budget(policy, args, CUDA, DATA).tokens)
    assert LONGEST < rows[0] == rows[1] < rows[2] == 4096


def test_a_stated_budget_on_a_gpu_gets_a_tier_in_which_it_fits(tmp_path, gpu_with):
    policy, args = tiny_policy(), arguments(tmp_path, tokens_per_pack=1024)
    shape = Shape.of(policy.get_base_model().config.to_dict())
    setup = replace(setup_of(policy, args, DATA, fused=True), head_rows=ROWS)
    held = memory.gradient_bytes(shape, setup) + memory.optimizer_bytes(shape, setup, on_gpu=True)
    gpu_with((memory.pack_bytes(shape, setup, "full", 1024) + held + 1) / (1 - memory.SLACK))
    choice = settle_budget(policy, args, CUDA, DATA)
    assert (choice.tokens, choice.tier) == (1024, "full")


def test_the_heads_chunk_follows_from_the_whole_memory_whatever_is_free_and_reaches_the_head(
    tmp_path, gpu_with, monkeypatch
):
    policy = tiny_policy()
    for free in (1e12, 1e9):
        gpu_with(free, share=1e8 / 2e12)  # 100 MB: a 64th is 4027 rows of 97 logits in fp32
        assert settle_budget(policy, arguments(tmp_path), CUDA, DATA).head_rows == 3968
    gpu_with(1e12, share=1e7 / 2e12)
    found = settle_budget(policy, arguments(tmp_path), CUDA, DATA)
    assert found.head_rows == 384
    monkeypatch.setattr(assembly, "settle_budget", lambda *_, **__: found)
    run = trainer(tmp_path / "run", DATA)
    heads = [module for module in run.model.modules() if isinstance(module, LogProbHead)]
    assert [head.rows_per_chunk for head in heads] == [384]


def test_of_unlike_devices_the_smallest_decides_on_every_rank(tmp_path, gpu_with, monkeypatch):
    """The head's chunk is part of what is weighed: another one might mean another tier."""
    gpu_with(1e12)
    monkeypatch.setattr(budget, "least", lambda number, device: min(number, 1e8))  # as another rank has it
    assert settle_budget(tiny_policy(), arguments(tmp_path), CUDA, DATA).head_rows == 3968


def test_where_nothing_fits_it_is_said(tmp_path, gpu_with, caplog):
    gpu_with(1e4)
    with caplog.at_level(logging.WARNING):
        choice = settle_budget(tiny_policy(), arguments(tmp_path), CUDA, DATA)
    assert (choice.tokens, choice.fits) == (LONGEST, False)
    assert "the longest pair has" in caplog.text
    assert "model.quantization" in caplog.text


@pytest.mark.parametrize("engine", ["one-process", "zero3", "fsdp2"])
def test_without_an_adapter_the_budget_is_for_what_training_will_hold(tmp_path, gpu_with, monkeypatch, engine):
    """When it is settled the model is there in bf16 alone: no masters, gradients, moments, nothing gathered."""
    policy, args = tiny_base(dtype=torch.bfloat16), arguments(tmp_path, reference="cached")
    args.engine = engine  # a launcher's in earnest
    here = sum(parameter.nbytes for parameter in policy.parameters())
    monkeypatch.setattr(budget, "_bytes_on", lambda device, model: here if model is policy else 0)
    shape, setup = Shape.of(policy.config.to_dict()), setup_of(policy, args, DATA, fused=False)
    assert (setup.full, setup.dtype, setup.attention, setup.engine) == (True, "bfloat16", "flash", engine)
    setup, held = replace(setup, head_rows=ROWS), memory.residents(shape, setup)
    assert held.before > here
    needed = memory.pack_bytes(shape, setup, "none", 256)
    gpu_with((needed + 1 + held.in_steps) / (1 - memory.SLACK) + held.before - here)
    choice = settle_budget(policy, args, CUDA, DATA, fused=False)
    assert memory.pack_bytes(shape, setup, choice.tier, choice.tokens) <= needed + 2
    assert choice.tokens >= 256
    assert "mlp" not in choice.reason
    with pytest.raises(InputError, match="the fused adapter functions can alone"):
        settle_budget(policy, arguments(tmp_path, recompute="mlp"), CUDA, DATA, fused=False)


def test_a_share_of_the_memory_that_a_process_is_held_to_counts(tmp_path, gpu_with):
    gpu_with(1e12, share=1e4 / 2e12)
    assert not settle_budget(tiny_policy(), arguments(tmp_path), CUDA, DATA).fits


def test_a_model_that_the_arithmetic_does_not_know_trains_with_the_usual_packs(tmp_path, gpu_with):
    gpu_with(1e12)
    torch.manual_seed(0)
    base = FalconForCausalLM(
        FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_hidden_size=64)
    )
    choice = settle_budget(attach_lora(base, lora()), arguments(tmp_path), CUDA, DATA)
    assert (choice.tokens, choice.tier) == (2048, "none")
    assert "falcon" in choice.reason


def test_the_setup_is_the_policys(tmp_path):
    policy = attach_lora(tiny_base(dtype=torch.bfloat16), lora(r=3, target_modules=["q_proj", "v_proj"]))
    setup = setup_of(policy, arguments(tmp_path, optim="sgd", reference="frozen_copy"), DATA, fused=False)
    assert (setup.dtype, setup.r, setup.targets, setup.optim) == ("bfloat16", 3, ["q_proj", "v_proj"], "sgd")
    assert (setup.reference, setup.adapter_kernels, setup.fused) == ("frozen_copy", "peft", False)
    assert setup.lengths.rows == pytest.approx(sum(pair.shared_length for pair in DATA) / len(DATA))


@pytest.mark.parametrize(("tokens", "count"), [(None, 0), ([1, 2], 2), ({"embed_tokens": [3]}, 1)])
def test_trained_tokens_are_counted(tmp_path, tokens, count):
    policy = attach_lora(tiny_base(), lora(trainable_token_indices=tokens))
    assert setup_of(policy, arguments(tmp_path), DATA, fused=True).trainable_tokens == count


def test_an_answer_that_is_not_trained_on_takes_no_room(tmp_path):
    args = arguments(tmp_path, objective="sft")
    lengths = setup_of(tiny_policy(), args, DATA, fused=True).lengths
    assert lengths.rejected == 0 < lengths.chosen
    long = [replace(DATA[0], chosen_ids=[3] * 1500, rejected_ids=[4] * 1500)]
    assert settle_budget(tiny_policy(), args, CPU, long).tokens == budget.CPU_TOKENS


@pytest.mark.parametrize("family", ["phi3", "gpt2", "glm", "llama"])
def test_gate_and_up_are_not_computed_again_of_itself_where_no_mlp_is_fused(tmp_path, monkeypatch, gpu_with, family):
    """However well that would suit the memory."""
    policy = text_policy(family)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name)
    gpu_with(1e9)
    monkeypatch.setattr(FocalPOConfig, "device", CUDA)
    monkeypatch.setattr(memory.choice, "relative_time", lambda shape, setup, tier, tokens: tier != "mlp")
    choice, words = assemble_kernels(policy, arguments(tmp_path), DATA)
    assert (choice.tier == "mlp") == (family == "llama") == ("gate and up computed again" in words["adapters"])


@pytest.mark.parametrize(("setting", "value"), [("recompute", "mlp"), ("elementwise_kernels", "triton")])
def test_what_only_fused_functions_have_is_refused_without_them(tmp_path, setting, value):
    with pytest.raises(InputError, match=f"{setting}={value} .*adapter_kernels"):
        trainer(tmp_path, DATA, adapter_kernels="peft", **{setting: value})


def test_kernels_of_adapters_are_refused_where_every_weight_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"elementwise_kernels=triton .*without an adapter, leave it out"):
        trainer(tmp_path, DATA, model=tiny_base(), objective="sft", elementwise_kernels="triton")


def test_a_trainer_says_how_it_computes(tmp_path):
    run = trainer(tmp_path, DATA, tokens_per_pack=None, recompute="mlp")
    assert run.budget.tokens == run.data_collator.tokens_per_pack == 2048
    assert run.kernels["recomputed"] == "gate and up"
    assert "2048 token rows" in run.kernels["packs"]
    assert run.kernels["attention"] == "blocks of rows (on cpu)"
    assert run.kernels["compiled"] == "no"
    padded = trainer(tmp_path, DATA, layout="padded", compile_layers=True)
    assert padded.kernels["attention"].startswith("transformers' sdpa")
    assert padded.kernels["compiled"] == "no: rows are padded"
    assert padded.data_collator.bucket == 1
