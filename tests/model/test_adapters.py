"""Where adapters go, what they may be, and the switch against PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraRuntimeConfig, get_peft_model
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.model.adapters import (
    ALL_LINEAR,
    AdapterSwitch,
    adapter_layers,
    adapter_parameters,
    attach_lora,
    check_trainable,
    features,
    linear_names,
    resolve_targets,
    trainable_token_ids,
)
from tests.model.families import IMAGE_TEXT, known_families, random_model
from tests.no_memory import lacking, whoever_says_it
from tests.tiny import disturb, lora, tiny_base, tiny_policy

pytestmark = pytest.mark.slow

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.arange(2, 20)[None]


@pytest.mark.row("10")
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_a_printed_list_without_head_and_embeddings(tied):
    model = tiny_base(tie_word_embeddings=tied)
    assert resolve_targets(model, "all-linear") == ALL
    assert "lm_head" not in linear_names(model)
    policy = attach_lora(model, lora())
    assert policy.peft_config["default"].target_modules == set(ALL)
    assert len(adapter_parameters(policy)) == 2 * 7 * 2


@pytest.mark.row("10")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("family", [name for name in IMAGE_TEXT if name in known_families()])
def test_no_layer_that_sees_an_image_takes_an_adapter(family, targets):
    """Encoders have layers of the text part's names; every text layer has its adapter all the same."""
    model = random_model(family, torch.float32)
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    text = {m for m in decoder.modules() if isinstance(m, nn.Linear) and m is not head}
    named = {m for n, m in decoder.named_modules() if m in text and (targets == ALL_LINEAR or n[-6:] in targets)}
    assert text < {m for m in model.modules() if isinstance(m, nn.Linear)}
    policy = attach_lora(model, lora(target_modules=targets))
    assert {layer.get_base_layer() for layer in adapter_layers(policy)} == named


@pytest.mark.row("10")
@pytest.mark.parametrize("family", ["llama4_text", "phimoe"])
def test_routers_that_give_their_choices_take_no_adapter(family):
    model = random_model(family, torch.float32)
    assert any(isinstance(m, nn.Linear) and "Router" in type(m).__name__ for m in model.modules())
    policy = attach_lora(model, lora())
    policy(IDS)
    assert not any("router" in name for name in policy.peft_config["default"].target_modules)
    with pytest.raises(InputError, match="no linear layer is named 'router'"):
        resolve_targets(model, ["router"])


@pytest.mark.row("10")
def test_looking_at_routers_draws_nothing_of_the_adapter_s_start():
    """PhiMoE's draw in training, in which a model of Python's door may be."""
    starts = []
    for training in (False, True):
        model = random_model("phimoe", torch.float32).train(training)
        torch.manual_seed(0)
        starts.append({n: p.detach() for n, p in adapter_parameters(attach_lora(model, lora())).items()})
        assert all(module.training is training for module in model.modules() if "Router" in type(module).__name__)
    for name, values in starts[0].items():
        assert torch.equal(values, starts[1][name])


@whoever_says_it
def test_a_device_without_memory_makes_no_layer_a_router(monkeypatch, error):
    monkeypatch.setattr(FalconLinear, "forward", lacking(error))
    with pytest.raises(type(error)) as raised:
        linear_names(random_model("falcon", torch.float32))
    assert raised.value is error


@pytest.mark.row("10")
def test_what_peft_refuses_is_one_message_and_leaves_the_model_as_it_was():
    model = random_model("mamba", torch.float32)
    before = dict(model.named_modules())
    with pytest.raises(InputError, match=r"adapter: .*'out_proj' is incompatible with Mamba"):
        attach_lora(model, lora())
    assert dict(model.named_modules()) == before
    assert adapter_parameters(attach_lora(model, lora(target_modules=["in_proj"])))


@pytest.mark.row("10")
@pytest.mark.parametrize(
    ("wrong", "hint"),
    [(["q_porj"], "q_proj"), ("k-proj", "k_proj"), (["q_proj", "lm_head"], "output head"), ([], "empty")],
)
def test_wrong_targets_are_answered_with_the_nearest(wrong, hint):
    with pytest.raises(InputError, match=hint):
        resolve_targets(tiny_base(), wrong)


@pytest.mark.row("6", "32")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"modules_to_save": [], "rank_pattern": {}, "trainable_token_indices": None}, ""),
        ({"use_rslora": True, "use_dora": True}, "rslora dora"),
        ({"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}}, "gaussian patterns"),
        ({"init_lora_weights": False, "alpha_pattern": {"q_proj": 2}}, "random patterns"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)}, "eva"),
        ({"modules_to_save": ["norm"], "trainable_token_indices": [1]}, "modules_to_save trainable_tokens"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_parameters": ["x"]}, "other:target_parameters"),
        ({"lora_bias": True}, "other:lora_bias"),
        ({"layer_replication": [(0, 1)]}, "other:layer_replication"),
        ({"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}, "other:runtime_config"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "lora_dropout": 0.1}, ""),
    ],
)
def test_an_adapters_words_in_the_compatibility_table(settings, words):
    assert features(lora(**settings)) - {"lora"} == {*words.split()}


@pytest.mark.row("46")
def test_tokens_are_named_by_text_or_by_id():
    tokenizer = toy_tokenizer()
    vocabulary = tokenizer.get_vocab()
    text = next(word for word in sorted(vocabulary) if word.isalnum())
    eos = tokenizer.eos_token
    ids = trainable_token_ids([eos, text, vocabulary[text], 0], tokenizer)
    assert ids == sorted({vocabulary[eos], vocabulary[text], 0})
    assert trainable_token_ids([], tokenizer) == []
    for wrong in (len(vocabulary) + 5, -1, f"{text} {text} {eos}", "\N{SNOWMAN}"):
        with pytest.raises(InputError, match=r"adapter\.trainable_tokens.*resize_token_embeddings"):
            trainable_token_ids([wrong], tokenizer)


def test_some_targets():
    assert resolve_targets(tiny_base(), ["v_proj", "self_attn.q_proj", "v_proj"]) == ["self_attn.q_proj", "v_proj"]


@pytest.mark.row("45", "21")
def test_an_adapter_on_the_output_head_is_refused():
    with pytest.raises(InputError, match="output head"):
        attach_lora(tiny_base(tie_word_embeddings=True), lora(target_modules=["lm_head"]))


@pytest.mark.newest
@pytest.mark.row("10")
def test_names_that_peft_takes_for_experts_are_left_out_or_refused():
    """DeepSeek-V3's dense layers and shared experts have the names that its experts had: PEFT would adapt those."""
    model = random_model("deepseek_v3")
    targets = resolve_targets(model, "all-linear")
    assert {"kv_b_proj", "o_proj"} <= {*targets}
    assert not {"gate_proj", "up_proj", "down_proj"} & {*targets}
    policy = attach_lora(model, lora())
    assert features(policy.peft_config["default"]) == {"lora"}
    for named in (["o_proj", "gate_proj", "up_proj", "down_proj"], ["gate_proj"]):
        with pytest.raises(InputError, match=r"adapter\.targets: .*gate_proj"):
            resolve_targets(random_model("deepseek_v3"), named)
    assert resolve_targets(random_model("qwen3"), ["gate_proj"]) == ["gate_proj"]


@pytest.mark.row("6")
def test_plain_lora_switched_off_is_the_base_to_the_last_bit():
    base = tiny_base()
    with torch.no_grad():
        before = base(IDS).logits
        policy = disturb(attach_lora(base, lora()))
        with AdapterSwitch(policy).off():
            off = policy(IDS).logits
        assert torch.equal(off, before)
        assert not torch.equal(policy(IDS).logits, before)


def test_our_switch_gives_what_pefts_gives_and_touches_nothing_else():
    policy = tiny_policy()
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    with torch.no_grad():
        with AdapterSwitch(policy).off():
            ours = policy(IDS).logits
        assert not frozen.requires_grad
        on = policy(IDS).logits
        with policy.disable_adapter():
            assert torch.equal(policy(IDS).logits, ours)
    assert not torch.equal(on, ours)


def test_the_switch_comes_back_on_after_an_error_and_keeps_what_was_off():
    policy = tiny_policy()
    switch = AdapterSwitch(policy)
    with torch.no_grad():
        on = policy(IDS).logits
        with pytest.raises(RuntimeError), switch.off():
            raise RuntimeError
        assert torch.equal(policy(IDS).logits, on)
        with switch.off():
            with switch.off():
                pass
            assert not torch.equal(policy(IDS).logits, on)


def test_a_model_without_adapters_has_nothing_to_switch():
    with pytest.raises(InputError, match="no adapter"):
        AdapterSwitch(tiny_base())


def test_an_adapter_on_the_embeddings_is_refused():
    policy = get_peft_model(tiny_base(), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(InputError, match=r"embed_tokens, which is Embedding and no linear layer.*trainable_token"):
        check_trainable(policy)


@pytest.mark.parametrize("name", ["layers.1", "model"])
def test_a_whole_layer_is_not_trained_in_full_but_its_parts_are(name):
    with pytest.raises(InputError, match=rf"{name} is or holds a whole layer .*`layers\.0\.mlp`"):
        attach_lora(tiny_base(), lora(modules_to_save=[name]))
    attach_lora(tiny_base(), lora(modules_to_save=["layers.1.mlp", "layers.1.self_attn"]))


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens"])
def test_tokens_of_embeddings_that_are_trained_in_full_are_refused(name):
    with pytest.raises(InputError, match=r"trainable_tokens: .*rows of model\.embed_tokens.*leave one of the two out"):
        attach_lora(tiny_base(), lora(modules_to_save=[name], trainable_token_indices=[3]))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_key_of_a_pattern_that_is_no_regular_expression_is_refused(setting):
    with pytest.raises(InputError, match=rf"adapter\.{setting}: '\(q_proj' is no regular expression \(missing \)"):
        attach_lora(tiny_base(), lora(**{setting: {"(q_proj": 4}}))
