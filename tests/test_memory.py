"""The arithmetic of residents, choices and operations, against real models, optimisers and published tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorafocal import memory
from lorafocal.compatibility import OFFLOADS, QUANTIZED, SPLIT_WEIGHTS
from lorafocal.errors import InputError
from lorafocal.memory import Lengths, Setup, Shape, choose
from lorafocal.model.adapters import adapter_parameters, attach_lora
from lorafocal.model.load import load_base
from tests.test_activation_bytes import FAMILIES, TINY
from tests.tiny import lora

pytestmark = pytest.mark.slow

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
GIB = 2**30


def written(folder: Any, family: str = "llama", **more: Any) -> Shape:
    """A tiny base of `family` in `folder`, and its shape."""
    config = CONFIG_MAPPING[family](**(TINY | more))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Shape.of(config.to_dict())


def held_bytes(model: nn.Module) -> int:
    """Every tensor that a loaded base holds, each storage once, scales of quantised weights among them."""
    found: list[object] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for owner in filter(None, (state, getattr(state, "state2", None))):
            found += [owner.absmax, owner.code, owner.offset]
        found.append(getattr(parameter, "SCB", None))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found if isinstance(t, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())


# --- residents ------------------------------------------------------------------------------------------------------


@pytest.mark.row("37")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_base_is_counted_to_the_byte(tmp_path, family, dtype):
    shape = written(tmp_path, family)
    base = load_base(str(tmp_path), dtype=dtype)
    assert memory.weight_bytes(shape, Setup(dtype=dtype)) == held_bytes(base)


@pytest.mark.row("37")
@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_base_is_counted_to_the_byte(tmp_path, quantization, tied):
    shape = written(tmp_path, hidden_size=96, intermediate_size=200, head_dim=24, tie_word_embeddings=tied)
    base = load_base(str(tmp_path), dtype="bfloat16", quantization=quantization)
    assert memory.weight_bytes(shape, Setup(quantization=quantization)) == held_bytes(base)


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_3_8B | {"model_type": "mistral", "vocab_size": 32000}, 7_241_732_096),
        (
            LLAMA_3_8B
            | {"model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36},
            8_190_735_360,
        ),
    ],
)
def test_published_models_have_their_published_size(config, parameters):
    assert Shape.of(config).parameters == parameters


@pytest.mark.row("37")
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"targets": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "layers.1.mlp", "input_layernorm"]},
        {"trainable_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_what_is_trained_is_counted_to_the_byte(family, adapter):
    if family == "phi3" and {"targets", "rank_pattern"} & {*adapter}:
        adapter = {"targets": ["qkv_proj"], "rank_pattern": {"qkv_proj": 8}}
    config = CONFIG_MAPPING[family](**TINY)
    asked = Setup(r=4, **adapter)
    words = {"target_modules": asked.targets, "rank_pattern": dict(asked.rank_pattern), "use_dora": asked.use_dora}
    words |= {"modules_to_save": list(asked.modules_to_save) or None}
    words |= {"trainable_token_indices": list(range(asked.trainable_tokens)) or None}
    policy = attach_lora(AutoModelForCausalLM.from_config(config).requires_grad_(False), lora(**words))
    held = sum(parameter.nbytes for parameter in adapter_parameters(policy).values())
    assert memory.adapter_bytes(Shape.of(config.to_dict()), asked) == held


@pytest.mark.row("37")
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adamw_8bit"])
def test_moments_of_optimisers_are_counted(optim):
    from bitsandbytes.optim import AdamW8bit

    shape = Shape.of(CONFIG_MAPPING["llama"](**TINY).to_dict())
    asked = Setup(r=80, optim=optim)  # some tensors above bitsandbytes' smallest, some below
    tensors = [nn.Parameter(torch.zeros(entries)) for entries in memory.trained_tensors(shape, asked)]
    kinds = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "adamw_8bit": AdamW8bit}
    optimizer: Any = kinds[optim](tensors, lr=1e-3)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.startswith("qmap") and name != "step"  # shared; one number
    )
    assert memory.optimizer_bytes(shape, asked) == held
    assert {tensor.numel() >= 4096 for tensor in tensors} == {True, False}


@pytest.mark.row("37")
def test_paged_moments_of_large_tensors_need_not_be_on_the_gpu():
    shape, paged = Shape.of(LLAMA_3_8B), Setup(r=128, optim="paged_adamw_32bit")
    assert memory.optimizer_bytes(shape, paged) == 8 * memory.adapter_parameters(shape, paged)
    assert memory.optimizer_bytes(shape, paged, on_gpu=True) == 0  # all tensors have 131,072 entries or more
    assert memory.optimizer_bytes(shape, Setup(r=16, optim="paged_adamw_32bit"), on_gpu=True) > 0


@pytest.mark.row("37")
def test_a_reference_adds_what_it_holds():
    shape = Shape.of(LLAMA_3_8B)
    assert memory.reference_bytes(shape, Setup()) == memory.reference_bytes(shape, Setup(reference="cached")) == 0
    copy, second = Setup(reference="frozen_copy"), Setup(reference="separate_model")
    assert memory.reference_bytes(shape, copy) == memory.adapter_bytes(shape, copy)
    assert memory.reference_bytes(shape, second) == memory.weight_bytes(shape, second)


@pytest.mark.row("37")
def test_whole_distributions_cost_rows_products_and_where_weights_are_split_a_head():
    """Of a reference's head that is not the policy's, while its own weights are let go."""
    shape = Shape.of(LLAMA_3_8B)
    plain, compared = Setup(), Setup(divergences=True)
    kept, held = (
        [bytes_of(shape, asked) for asked in (plain, compared)]
        for bytes_of in (
            lambda *of: memory.activation_bytes_per_token(*of, "none") * 810,
            lambda *of: memory.peaks(*of, "none")[1][1] * 810,  # in the last layer's backward
        )
    )
    assert kept[1] - kept[0] == pytest.approx(610 * (2 * 4096 + 8))  # of each answer's row a second gradient
    assert held[1] - held[0] == pytest.approx(610 * 2 * 4096)  # gone by the peak in the last layer; the other's row
    product = 2 * 128256 * 4096 * 610
    assert memory.flops_per_pair(shape, compared) - memory.flops_per_pair(shape, plain) == product
    head = 2 * 128256 * 4096
    for engine, reference, copied in (
        ("ddp", "separate_model", 0),
        ("zero3", "disabled_adapter", 0),
        ("zero3", "separate_model", head),
        ("fsdp2", "separate_model", head),
    ):
        found = [
            memory.residents(shape, Setup(divergences=asked, engine=engine, reference=reference), 8).gathered
            for asked in (False, True)
        ]
        assert found[1] - found[0] == copied


@pytest.mark.row("37")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained_without_an_adapter_a_tied_one_once(family, tied):
    config = CONFIG_MAPPING[family](**TINY, tie_word_embeddings=tied)
    model, shape = AutoModelForCausalLM.from_config(config), Shape.of(config.to_dict())
    sizes = sorted(parameter.numel() for parameter in model.parameters())
    assert sorted(memory.trained_tensors(shape, Setup(full=True))) == sizes
    assert memory.adapter_parameters(shape, Setup(full=True)) == shape.parameters


# --- what engines share ---------------------------------------------------------------------------------------------

# Bytes a parameter on each of 8 GPUs, of weights, masters, gradients and moments. The usual 16 of mixed precision
# (Rajbhandari et al., 2020) has gradients in bf16; here they are added up over packs in fp32, which is 2 more.
A_PARAMETER = {
    "one-process": 4 + 4 + 8,
    "ddp": 4 + 2 * 4 + 8,  # gradients once more in the buckets that are exchanged
    "zero1": 2 + 4 + (4 + 4 + 8) / 8,
    "zero2": 2 + (4 + 4 + 8) / 8,
    "zero3": (2 + 4 + 4 + 8) / 8,
    "fsdp2": (4 + 4 + 8) / 8,  # weights are the masters
}


def resident(engine: str, gpus: int = 8, **more: Any) -> memory.Residents:
    setup = Setup(full=True, engine=engine, **({"reference": "cached"} | more))
    return memory.residents(Shape.of(LLAMA_3_8B), setup, gpus)


@pytest.mark.row("37")
@pytest.mark.parametrize("engine", A_PARAMETER)
def test_bytes_a_parameter_under_every_engine(engine):
    held = resident(engine)
    total = held.before + held.gradients + held.states
    assert total == pytest.approx(A_PARAMETER[engine] * 8_030_261_248, rel=1e-6)
    assert memory.SHARING[engine].weights == (engine in SPLIT_WEIGHTS)
    published = 16 * 8.03e9 / 8  # bytes a GPU of weights split over 8
    assert engine not in SPLIT_WEIGHTS or 0.999 < total / published < 1.001 * 18 / 16


@pytest.mark.row("37")
def test_a_live_reference_is_held_as_the_policy_is():
    parameters = 8_030_261_248
    for engine, bytes_each in {"ddp": 4, "zero2": 2, "zero3": 2 / 8, "fsdp2": 2 / 8}.items():
        live = resident(engine, reference="separate_model")
        assert live.reference == pytest.approx(bytes_each * parameters, rel=1e-6)
        assert live.before - live.reference == resident(engine).before


@pytest.mark.row("37")
def test_offloading_takes_bytes_off_the_gpu_and_loses_none():
    for engine, words in OFFLOADS.items():
        whole = resident(engine)
        for word in words:
            moved = resident(engine, offload=word)
            assert moved.before + moved.in_steps + moved.host == pytest.approx(whole.before + whole.in_steps)
            assert moved.host > 0
            assert moved.states == moved.masters == 0


@pytest.mark.row("37")
def test_engines_that_split_adapters_split_their_base_too():
    shape, alone = Shape.of(LLAMA_3_8B), memory.residents(Shape.of(LLAMA_3_8B), Setup())
    split = memory.residents(shape, Setup(engine="zero3"), 8)
    assert (split.weights, split.adapter, split.states) == (alone.weights / 8, alone.adapter / 8, alone.states / 8)
    assert memory.residents(shape, Setup(engine="zero2"), 8).weights == alone.weights


@pytest.mark.row("37")
def test_sizes_that_deepspeed_is_given_are_those_that_are_counted():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from lorafocal.engines import zero
    from lorafocal.memory import shards

    args: Any = SimpleNamespace(engine="zero3", optim="adamw_torch", use_cpu=True, offload="none", max_grad_norm=1.0)
    assert zero.deepspeed_config(args)["zero_optimization"]["reduce_bucket_size"] == shards.BUCKET_ENTRIES
    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == shards.LIVE_PARAMETERS


def test_what_gpus_send_each_other():
    """By 8 GPUs, as parts of the parameters' bytes: weights 2, gradients 4 each."""
    shape = Shape.of(LLAMA_3_8B)

    def sent(engine: str, gpus: int = 8, packs: int = 3, **more: Any) -> tuple[float, float]:
        found = memory.traffic(shape, Setup(full=True, engine=engine, **more), gpus, packs)
        return tuple(round(value / shape.parameters * 8 / 7, 4) for value in (found.beside, found.after))

    assert sent("ddp") == (2 * 4, 0)  # once a step, whatever its packs
    assert sent("zero1") == (0, 2 * 4 + 2)
    assert sent("zero2") == (0, 3 * 2 * 4 + 2)
    assert sent("zero3") == sent("fsdp2") == (3 * (2 * 2 + 4), 0)
    assert sent("zero3", reference="separate_model") == (3 * (3 * 2 + 4), 0)
    assert sent("zero3", gpus=1) == (0, 0)
    assert memory.traffic(shape, Setup(engine="ddp"), 8, 3) == memory.Traffic(0, 0)  # adapters: not worth counting


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mixtral"}, "does not know the layers of model_type 'mixtral'; it knows llama"),
        ({"model_type": "llama"}, "hidden_size is None"),
        (LLAMA_3_8B | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_shapes_that_are_not_known_are_refused(config, said):
    with pytest.raises(InputError, match=said):
        Shape.of(config)


# --- activations at published shapes --------------------------------------------------------------------------------


@pytest.mark.row("37", "35")
def test_a_token_of_llama_3_8b():
    """At most the 3.5 MiB that are asked of fused functions, less than half of PEFT's own."""
    shape, at = Shape.of(LLAMA_3_8B), Lengths(256, 384, 384)
    per_token = {
        (kernels, tier): memory.activation_bytes_per_token(shape, Setup(adapter_kernels=kernels, lengths=at), tier)
        for kernels, tier in (("fused", "none"), ("fused", "mlp"), ("fused", "full"), ("peft", "none"))
    }
    fused, mlp, full, peft = (value / 2**20 for value in per_token.values())
    assert fused < 3.5 < 5.6 < peft < 7.9
    assert mlp == pytest.approx(fused - 2 * 32 * 14336 * 2 / 2**20)
    assert full < 0.27


@pytest.mark.row("36")
def test_the_heads_chunk_is_a_small_part_of_a_device_in_whole_tiles_of_rows():
    shape = Shape.of(LLAMA_3_8B)
    sizes = (4, 12, 16, 20, 24, 80, 140)
    found = [memory.head_rows(shape, Setup(), gib * GIB) for gib in sizes]
    assert found == [128, 256, 256, 384, 512, 512, 512]  # 2^26 entries are 523 rows
    for gib, rows in list(zip(sizes, found, strict=True))[1:]:
        asked = Setup(head_rows=rows)
        assert memory.head_chunk_bytes(shape, asked) == rows * 128256 * 6 <= gib * GIB / 64
        assert rows == 512 or (rows + memory.ROW_TILE) * 128256 * 6 > gib * GIB / 64
        assert choose(shape, asked, gib * GIB, 1024).head_rows == rows
    narrow, compared = Setup(quantization="nf4"), Setup(divergences=True)
    assert memory.head_rows(shape, narrow, 24 * GIB) == 512
    assert memory.head_rows(shape, compared, 24 * GIB) == 256  # three in fp32 at a time


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.row("37")
def test_more_memory_never_gives_less():
    shape, setup = Shape.of(LLAMA_3_8B), Setup(quantization="nf4")
    found = [choose(shape, setup, gib * GIB, 1024) for gib in range(1, 64)]
    times = [memory.relative_time(shape, setup, c.tier, c.tokens) for c in found if c.fits]
    assert times == sorted(times, reverse=True)
    assert [choice.fits for choice in found] == sorted(choice.fits for choice in found)
    assert (found[-1].tier, found[-1].tokens) == ("none", memory.MAX_TOKENS)


@pytest.mark.row("37")
@pytest.mark.parametrize("gib", [3, 6, 12, 24])
def test_what_is_chosen_fits_and_the_next_step_would_not(gib):
    shape, setup = Shape.of(LLAMA_3_8B), Setup()
    found = choose(shape, setup, gib * GIB, 1024)
    assert found.fits
    assert found.tokens >= 1024
    assert memory.pack_bytes(shape, setup, found.tier, found.tokens) <= gib * GIB
    more = found.tokens + memory.TOKEN_STEP
    assert memory.pack_bytes(shape, setup, found.tier, more) > gib * GIB or found.tokens == memory.MAX_TOKENS


@pytest.mark.row("37")
def test_a_longest_pair_that_fits_nowhere_is_told():
    found = choose(Shape.of(LLAMA_3_8B), Setup(), 1 * GIB, 8192)
    assert (found.fits, found.tier) == (False, "full")
    assert "8192 token rows" in found.reason


@pytest.mark.row("37")
def test_tiers_that_are_not_there_are_not_chosen():
    shape = Shape.of(LLAMA_3_8B)
    assert memory.tiers_of(shape, Setup(adapter_kernels="peft")) == ("none", "full")
    assert memory.tiers_of(shape, Setup(use_dora=True)) == ("none", "full")
    with pytest.raises(InputError, match="the fused adapter functions can alone"):
        choose(shape, Setup(adapter_kernels="peft"), 40 * GIB, 1024, ("mlp",))


# --- operations -----------------------------------------------------------------------------------------------------

# TFLOP a pair: two sequences with and without checkpointing, one row of a shared prompt with and without.
# From the cost model in docs/memory.md, worked out by hand before this file was written.
TABLE = {
    (256, 384, True): (75.5, 57.3, 61.0, 46.4),
    (256, 384, False): (56.6, 38.4, 45.7, 31.2),
    (200, 305, False): (44.5, 30.2, 36.0, 24.5),
    (205, 400, False): (53.6, 36.4, 44.9, 30.6),
}


@pytest.mark.row("35")
@pytest.mark.parametrize(("prompt", "answer", "live"), TABLE)
def test_operations_of_a_pair_are_the_published_ones(prompt, answer, live):
    shape, at = Shape.of(LLAMA_3_8B), Lengths(prompt, answer, answer)
    found = tuple(
        memory.flops_per_pair(shape, Setup(), at, tier=tier, live_reference=live, shared=shared) / 1e12
        for shared in (False, True)
        for tier in ("full", "none")
    )
    assert found == pytest.approx(TABLE[prompt, answer, live], abs=0.06)


@pytest.mark.row("35")
@pytest.mark.parametrize(
    ("prompt", "answer", "stored", "live"), [(200, 305, 59.6, 74.4), (205, 400, 71.8, 89.7)], ids=str
)
def test_operations_of_the_papers_own_training(prompt, answer, stored, live):
    """Every weight trained, two sequences a pair, every layer computed again: from the cost model, by hand."""
    shape, at = Shape.of(LLAMA_3_8B), Lengths(prompt, answer, answer)
    found = [
        memory.flops_per_pair(shape, Setup(full=True), at, tier="full", shared=False, live_reference=second) / 1e12
        for second in (False, True)
    ]
    assert found == pytest.approx([stored, live], abs=0.06)


@pytest.mark.row("35")
def test_a_weight_that_is_trained_whole_adds_the_product_of_its_gradient():
    """The head's makes its logits again too; an embedding has no product."""
    shape, at = Shape.of(LLAMA_3_8B), Lengths(256, 384, 384)
    none, head, tokens, layer = (
        memory.flops_per_pair(shape, Setup(r=0, modules_to_save=modules), at)
        for modules in ((), ("lm_head",), ("embed_tokens",), ("layers.3.mlp.up_proj",))
    )
    assert head - none == 2 * (2 * 4096 * 128256) * at.answers
    assert tokens == none
    assert layer - none == 2 * 4096 * 14336 * at.rows


def test_trained_tokens_of_a_tied_model_have_a_head_that_is_trained():
    """The weight that both ends read has a gradient, and is put together for each pass."""
    tied, apart = (Shape.of(LLAMA_3_8B | {"tie_word_embeddings": tie}) for tie in (True, False))
    plain, tokens = Setup(), Setup(trainable_tokens=3)
    weight = tied.head_parameters
    assert memory.head_chunk_bytes(tied, tokens) - memory.head_chunk_bytes(tied, plain) == weight * (4 + 2 + 2)
    product = 2 * weight * plain.lengths.answers
    assert memory.flops_per_pair(tied, tokens) - memory.flops_per_pair(tied, plain) == 2 * product
    assert memory.head_chunk_bytes(apart, tokens) == memory.head_chunk_bytes(apart, plain)
    assert memory.flops_per_pair(apart, tokens) == memory.flops_per_pair(apart, plain)


@pytest.mark.row("35")
def test_the_minimum_has_no_reference_and_nothing_twice():
    shape, at = Shape.of(LLAMA_3_8B), Lengths(256, 384, 384)
    least = memory.minimum_flops_per_pair(shape, Setup(), at)
    assert least == memory.flops_per_pair(shape, Setup(reference="cached"), at)
    assert least == pytest.approx(31.15e12, rel=1e-3)
    again = memory.flops_per_pair(shape, Setup(reference="cached"), at, tier="mlp")
    assert 790e12 / again == pytest.approx(20.3, abs=0.05)


@pytest.mark.row("35")
@pytest.mark.parametrize("window", [None, 3, 7, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    from lorafocal.ops.segments import PairSpan, visible

    lengths = Lengths(5, 4, 7)
    mask = visible((PairSpan(0, 5, 4, 7),), window, torch.device("cpu"))
    assert lengths.visible(window) == int(mask.sum())
