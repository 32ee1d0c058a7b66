"""Bases in 4 and 8 bits: what is quantised and what is not, what the layers compute, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lorafocal.compatibility import QUANTIZED
from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora, linear_names
from lorafocal.model.load import load_base
from lorafocal.model.quantized import (
    bitsandbytes_config,
    check_loaded,
    dequantized_weight,
    describe,
    quantization_of,
    settle,
    to_device,
    word_of,
)
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.probes import LayoutChoice, check_packing, choose_layout
from tests.model.families import random_model
from tests.repacking import repacking_cpu
from tests.tiny import adapter_gradients, disturb, lora, pairs, tiny_base

pytestmark = pytest.mark.slow

IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny float bases on disk, by family."""
    root = tmp_path_factory.mktemp("bases")
    tiny_base().save_pretrained(root / "llama")
    families = ("llama tied", "gpt2", "gpt_neox", "llava", "falcon", "mixtral", "qwen3_moe")
    for family in families:
        random_model(family, torch.float32).save_pretrained(root / family)
    return {family: root / family for family in ("llama", *families)}


@pytest.fixture
def llama(folders: dict[str, Path]) -> str:
    return str(folders["llama"])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if word_of(module) is not None]


# --- plan and reality ---------------------------------------------------------------------------------------


@pytest.mark.row("9")
@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "gpt_neox", "llava"])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_every_inner_linear_layer_is_quantised_and_nothing_else_of_the_text_part(folders, family, quantization):
    model = load_base(str(folders[family]), quantization=quantization)
    names = linear_names(model)
    assert {word_of(model.get_submodule(name)) for name in names} == {quantization}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.dtype == embeddings.weight.dtype == torch.bfloat16
    assert quantization_of(model) == quantization
    found = describe(model)
    assert (found.quantized_layers, found.float_layers, found.quantized_share) == (len(names), 0, 1.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.row("9")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("falcon", r"100% of the inner weights of FalconForCausalLM stayed in float.*layers of that kind"),
        (
            "mixtral",
            r"8\d% of the inner weights of Mixtral.* \(such as \S*experts\.\S*\).*experts kept in one tensor",
        ),
        ("qwen3_moe", r"6\d% of the inner weights of Qwen3Moe.*experts kept in one tensor"),
    ],
)
def test_a_base_that_would_stay_mostly_in_float_is_refused_by_name(folders, family, why, quantization):
    """The libraries quantise what they know and say nothing of the rest."""
    with pytest.raises(InputError, match=rf"model\.quantization: {quantization} was asked for, but {why}"):
        load_base(str(folders[family]), quantization=quantization)
    assert describe(load_base(str(folders[family]))).quantization is None


@pytest.mark.row("9")
def test_a_plan_that_was_not_followed_is_refused(llama):
    model = load_base(llama, quantization="nf4")
    assert check_loaded(model, quantization="nf4", dtype=torch.bfloat16) == describe(model)
    for plan, dtype, message in (
        ("fp4", torch.bfloat16, "fp4 was asked for, but LlamaForCausalLM was loaded with nf4"),
        (None, torch.bfloat16, "none was asked for, but LlamaForCausalLM was loaded with nf4"),
        ("nf4", torch.float32, "float32 was asked for, but LlamaForCausalLM has embeddings in bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            check_loaded(model, quantization=plan, dtype=dtype)
    with pytest.raises(InputError, match=r"100% of the inner weights .* stayed in float"):
        check_loaded(load_base(llama), quantization="nf4", dtype=torch.bfloat16)


@pytest.mark.row("9")
def test_what_was_loaded_is_said_in_a_line_and_in_the_manifest(llama):
    found = describe(load_base(llama, quantization="nf4-double"))
    assert str(found) == (
        "base: computes in bfloat16; 14 linear layers in nf4-double, 0 linear layers in float (100.0% of the inner"
        " weights are quantised); norms bfloat16, embeddings bfloat16, head bfloat16; attention sdpa"
    )
    assert json.loads(json.dumps(found.as_dict())) == {
        "quantization": "nf4-double",
        "dtype": "bfloat16",
        "quantized_layers": 14,
        "float_layers": 0,
        "quantized_share": 1.0,
        "norms": "bfloat16",
        "embeddings": "bfloat16",
        "head": "bfloat16",
        "attention": "sdpa",
    }
    assert str(describe(load_base(llama, dtype="float32"))).startswith(
        "base: computes in float32; 14 linear layers in float; norms float32"
    )


@pytest.mark.row("60")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "codes"), [("nf4", "uint8"), ("fp4-double", "uint8"), ("int8", "int8")])
def test_norms_embeddings_head_and_biases_keep_the_dtype_of_the_model(folders, quantization, codes, dtype):
    """No blanket fp32 upcast, which doubles their memory and breaks attention kernels."""
    for family in ("llama", "gpt2"):
        model = load_base(str(folders[family]), dtype=dtype, quantization=quantization)
        held = {f"{name}.weight" for name in linear_names(model)}
        found = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
        assert found == {name: f"torch.{codes if name in held else dtype}" for name in found}
        assert {str(getattr(layer, "compute_dtype", model.dtype)) for layer in layers(model)} == {f"torch.{dtype}"}
        policy = attach_lora(model, lora())
        adapters = {parameter.dtype for name, parameter in policy.named_parameters() if "lora_" in name}
        assert adapters == {torch.float32}
        assert {str(p.dtype) for name, p in model.named_parameters() if "norm" in name or "ln_" in name} == {
            f"torch.{dtype}"
        }


@pytest.mark.row("12")
def test_half_precision_is_refused_with_and_without_quantisation(llama):
    with pytest.raises(InputError, match="overflows"):
        load_base(llama, dtype="float16", quantization="nf4")
    own = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float16, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    settle(own)
    with pytest.raises(InputError, match="float16, which is not supported"):
        choose_layout(own, "auto")


def test_an_unknown_word_is_refused(llama):
    with pytest.raises(InputError, match=r"'nf8' is unknown; choose one of nf4, nf4-double, fp4, fp4-double, int8"):
        load_base(llama, quantization="nf8")


# --- what the layers compute --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", [None, *QUANTIZED])
def test_a_layer_multiplies_by_its_dequantised_weight_and_so_does_its_gradient(folders, family, quantization):
    model = load_base(str(folders[family]), dtype="float32", quantization=quantization)
    for name in linear_names(model):
        layer = model.get_submodule(name)
        weight, bias = dequantized_weight(layer), 0.0 if layer.bias is None else layer.bias
        x = torch.randn(5, weight.shape[1], requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, x @ weight.T + bias)
        g = torch.randn_like(y)
        y.backward(g)
        torch.testing.assert_close(x.grad, g @ weight)


def test_the_error_of_each_kind_is_as_large_as_its_bits(llama):
    exact = tiny_base().model.layers[0].mlp.down_proj.weight
    errors = {
        word: float(
            (
                dequantized_weight(load_base(llama, dtype="float32", quantization=word).model.layers[0].mlp.down_proj)
                - exact
            ).norm()
            / exact.norm()
        )
        for word in QUANTIZED
    }
    assert errors["int8"] < 0.02 < errors["nf4"] < 0.12 < errors["fp4"] < 0.2
    assert abs(errors["nf4-double"] - errors["nf4"]) < 0.01


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_computes_what_training_does(llama, quantization, dtype):
    model = load_base(llama, dtype=dtype, quantization=quantization)
    training = logits(model)
    assert torch.equal(logits(model.eval()), training)
    assert torch.equal(logits(model.train()), training)


def gradients(policy: nn.Module) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    policy.train()
    batch = share_prefixes(pairs(5))
    scores = sequence_logps(policy, batch)
    (scores.chosen - scores.rejected).sum().backward()
    return adapter_gradients(policy)


@pytest.mark.row("9")
@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_after_an_evaluation_are_those_before_bit_for_bit(llama, quantization, dtype, monkeypatch):
    repacking_cpu(monkeypatch)
    policy = disturb(attach_lora(load_base(llama, dtype=dtype, quantization=quantization), lora()))
    prepare_policy(policy)
    before = gradients(policy)
    with torch.no_grad():
        sequence_logps(policy.eval(), share_prefixes(pairs(3)))
    after = gradients(policy)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.row("9")
def test_no_evaluation_repacks_the_weights(llama, monkeypatch):
    repacked = repacking_cpu(monkeypatch)
    logits(load_base(llama, quantization="nf4").eval())
    config = bitsandbytes_config("nf4", torch.bfloat16)
    own = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, quantization_config=config)
    settle(attach_lora(own, lora()))  # also with an adapter around the layers
    logits(own.eval())
    assert not repacked


@pytest.mark.row("9")
def test_weights_that_were_repacked_before_are_refused_with_the_way_out(llama):
    model = load_base(llama, quantization="nf4")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*load the model again.*before any forward"):
        settle(model)


@pytest.mark.row("9")
@pytest.mark.parametrize("used", [False, True])  # a layer's first forward takes them over
def test_an_8_bit_base_moves_with_its_codes_and_scales(llama, used):
    """As they stay behind where a GPU is: the codes another tensor than the weight, the scales where they were."""
    model = load_base(llama, dtype="float32", quantization="int8")
    wanted = logits(model) if used else None
    there = torch.device("cpu")
    for layer in layers(model):
        held = layer.state if used else layer.weight
        held.CB, held.SCB = held.CB.clone(), Mock(to={there: held.SCB}.__getitem__)
    to_device(model, there)
    for layer in layers(model):
        held = layer.state if used else layer.weight
        assert held.CB.data_ptr() == layer.weight.data_ptr()
        assert held.SCB.device == there
    if used:
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)


def test_settling_twice_or_a_float_model_changes_nothing(llama):
    for word in (None, "nf4", "int8"):
        model = load_base(llama, quantization=word)
        before, state = logits(model), {name: id(tensor) for name, tensor in model.named_parameters()}
        settle(model)
        assert torch.equal(logits(model), before)
        assert {name: id(tensor) for name, tensor in model.named_parameters()} == state


# --- int8 and outliers (docs/decisions/0006) ----------------------------------------------------------------


def with_outliers(folder: Path) -> str:
    """A base one column of whose layers' inputs is twenty times as large, as trained models have them."""
    model = tiny_base()
    for layer in model.model.layers:
        layer.input_layernorm.weight[5] = layer.post_attention_layernorm.weight[5] = 20.0
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.row("20")
def test_outlier_columns_would_let_a_pair_move_its_neighbours_and_are_off(tmp_path):
    model = load_base(with_outliers(tmp_path), dtype="float32", quantization="int8")
    for layer in layers(model):
        assert layer.state.threshold == 0.0
        layer.training = False  # what a GPU always does: activations are rounded to 8 bits too
    prepare_policy(model)
    check_packing(model)
    alone, beside = (sequence_logps(model, share_prefixes(pairs(8)[:count])).chosen[0] for count in (1, 4))
    assert alone == beside
    for layer in layers(model):
        layer.state.threshold = 6.0
    with pytest.raises(InputError, match="changing one pair moved another pair's log-probs"):
        check_packing(model)


@pytest.mark.row("9", "20")
def test_a_user_cannot_switch_them_on(llama):
    own = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert {layer.state.threshold for layer in layers(own)} == {6.0}
    settle(own)
    assert {layer.state.threshold for layer in layers(own)} == {0.0}
    layers(own)[3].state.has_fp16_weights = True
    with pytest.raises(InputError, match="keeps float16 weights"):
        settle(own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rounded", [False, True])
def test_packs_equal_one_at_a_time_on_quantised_bases(tmp_path, llama, dtype, rounded):
    """`rounded`: int8 as on a GPU, with activations in 8 bits."""
    for base in (llama, with_outliers(tmp_path)):
        for word in ("int8",) if rounded else ("nf4", "int8"):
            model = load_base(base, dtype=dtype, quantization=word)
            for layer in layers(model) if rounded else []:
                layer.training = False
            assert choose_layout(model, "auto") == LayoutChoice("packed", "")
            assert choose_layout(model, "padded") == LayoutChoice("padded", "")


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.row("9", "60")
@pytest.mark.parametrize("word", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_layers_are_quantised_there_and_gradients_outlive_an_evaluation(llama, word, dtype):
    model = load_base(llama, dtype=dtype, quantization=word)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert describe(model).quantized_share == 1.0
    policy = disturb(attach_lora(model, lora()))
    assert choose_layout(policy, "auto") == LayoutChoice("packed", "")
    batch = share_prefixes(pairs(5)).to(model.device)

    def gradients_there() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        scores = sequence_logps(policy.train(), batch)
        (scores.chosen - scores.rejected).sum().backward()
        return adapter_gradients(policy)

    before = gradients_there()
    with torch.no_grad():
        sequence_logps(policy.eval(), batch)
    after = gradients_there()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=0, rtol=1e-5)  # kernels may add in another order
