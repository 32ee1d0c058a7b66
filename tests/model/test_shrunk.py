"""Tiny models of an architecture: sizes small, everything that decides whether a run works as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lorafocal.errors import InputError
from lorafocal.model import shrunk as module
from lorafocal.model.adapters import linear_names
from lorafocal.model.shrunk import BLOCK, build, shrunk

pytestmark = pytest.mark.slow  # many small runs

TYPES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe",
    "olmo2", "smollm3", "granite", "cohere2", "gpt_oss", "deepseek_v3", "opt", "starcoder2", "falcon",
]  # fmt: skip


def tiny(kind: str, **values: Any) -> tuple[PreTrainedConfig, PreTrainedConfig, PreTrainedModel]:
    config = AutoConfig.for_model(kind, **values)
    small = shrunk(config, tokens=17, eos=1)
    return config, small, build(small, dtype=torch.float32, seed=0)


@pytest.mark.parametrize("kind", TYPES)
def test_the_architecture_is_kept(kind: str) -> None:
    config, small, model = tiny(kind)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    for name in linear_names(model):
        weight = model.get_submodule(name).weight
        assert (weight.numel() % BLOCK, weight.shape[0] % 2, weight.shape[1] % 2) == (0, 0, 0)
    assert small.vocab_size == 64
    assert small.num_hidden_layers >= 2
    with torch.no_grad():
        assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()
    with torch.device("meta"):
        real = module.AutoModelForCausalLM.from_config(config)
    assert {type(part) for part in real.modules()} == {type(part) for part in model.modules()}
    assert parts(real) == parts(model)


def parts(model: nn.Module) -> set[str]:
    """Names of parameters without the numbers in them: biases, norms and gates are there or not."""
    names = (name.split(".") for name, _ in model.named_parameters())
    return {".".join(word for word in words if not word.isdigit()) for words in names}


@pytest.mark.parametrize(
    ("heads", "groups", "expected"), [(32, 8, 4), (64, 4, 16), (16, 1, 4), (16, 16, 1), (24, 8, 3)]
)
def test_head_groups_are_kept(heads: int, groups: int, expected: int) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=heads * 64, num_attention_heads=heads, num_key_value_heads=groups
    )
    small = shrunk(config, tokens=17, eos=1)
    assert small.num_attention_heads // small.num_key_value_heads == expected
    assert (small.num_key_value_heads == 1) == (groups == 1)
    assert small.hidden_size == small.num_attention_heads * small.head_dim


def test_a_width_beside_the_heads_keeps_its_proportion() -> None:
    config = AutoConfig.for_model(
        "qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    )
    small = shrunk(config, tokens=17, eos=1)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim, small.hidden_size) == (4, 2, 32, 64)


def test_one_layer_of_each_kind_in_their_order() -> None:
    _, gemma, _ = tiny("gemma3_text")
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    assert gemma.sliding_window == module.WINDOW
    _, deepseek, model = tiny("deepseek_v3")
    assert deepseek.num_hidden_layers == 2
    names = {type(layer.mlp).__name__ for layer in model.get_decoder().layers}
    assert len(names) == 2  # a dense layer and one of experts
    everything = shrunk(AutoConfig.for_model("gemma3_text"), tokens=17, eos=1, all_layers=True)
    assert everything.layer_types == AutoConfig.for_model("gemma3_text").layer_types


def test_rotations_fit_the_smaller_heads() -> None:
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + n for n in range(48)],
        "long_factor": [2.0 + n for n in range(48)],
        "original_max_position_embeddings": 4096,
    }
    _, small, model = tiny("phi3", rope_parameters=longrope, max_position_embeddings=131072)
    half = small.hidden_size // small.num_attention_heads // 2
    assert len(small.rope_parameters["short_factor"]) == len(small.rope_parameters["long_factor"]) == half
    assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    _, small, _ = tiny("llama", rope_parameters=llama3)
    assert small.rope_parameters == llama3
    assert module._sections([16, 24, 24], 8) == [2, 3, 3]


@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("heads", [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 1}])
def test_layers_that_differ_stay_different(all_layers: bool, heads: dict[str, Any]) -> None:
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=12, num_key_value_heads=4, **heads)
    small = shrunk(config, tokens=17, eos=1, all_layers=all_layers)
    model = build(small, dtype=torch.float32, seed=0)
    kinds = [small.layer_types.index(kind) for kind in ("sliding_attention", "full_attention")]
    sliding, full = (model.model.layers[kind].self_attn.k_proj.out_features for kind in kinds)
    assert full == sliding * (1 if heads else 2)  # of heads that are twice as wide, the half or as many
    assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()


def test_layers_that_read_the_keys_of_others_stay_of_each_kind() -> None:
    kinds = ["full_attention" if layer % 5 == 4 else "sliding_attention" for layer in range(35)]
    _, small, model = tiny("gemma4_text", num_hidden_layers=35, layer_types=kinds, num_kv_shared_layers=20)
    assert small.layer_types == ["sliding_attention", "full_attention"] * 2
    assert [hasattr(layer.self_attn, "k_proj") for layer in model.model.layers] == [True, True, False, False]
    assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()
    everything = shrunk(small, tokens=17, eos=1, all_layers=True)
    assert everything.num_kv_shared_layers == 2


def test_no_more_experts_are_chosen_than_there_are() -> None:
    experts = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    _, small, model = tiny("gemma4_text", **experts)
    assert (small.num_experts, small.top_k_experts) == (4, 2)
    assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()


def test_tied_embeddings_stay_tied() -> None:
    _, _, model = tiny("qwen2", tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3"])
def test_of_an_image_text_model_both_parts_are_small(kind: str) -> None:
    _, small, model = tiny(kind)
    assert small.get_text_config().hidden_size <= 128
    assert model.eval()(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).logits.isfinite().all()


def test_what_cannot_be_made_small_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no tiny rwkv could be described"):
        shrunk(AutoConfig.for_model("rwkv"), tokens=17, eos=1)
    monkeypatch.setattr(module, "MOST_PARAMETERS", 1000)
    with pytest.raises(InputError, match="the tiny llama would still have"):
        build(shrunk(AutoConfig.for_model("llama"), tokens=17, eos=1), dtype=torch.float32, seed=0)


def test_the_callers_random_state_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shrunk(AutoConfig.for_model("llama"), tokens=17, eos=1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's state is the caller's too"))
    first, second = (build(small, dtype=torch.float32, seed=seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert any(not torch.equal(first[name], second[name]) for name in first)
