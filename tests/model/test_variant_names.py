"""Names and ranks of a variant: what matches nothing is refused, where PEFT passes over it or takes too much."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora, check_trainable
from tests.tiny import lora, tiny_base


@pytest.mark.row("32")
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_porj": 2}},
        {"alpha_pattern": {"q_porj": 2}},
        {"rank_pattern": {"lm_head": 2}, "alpha_pattern": {"q_proj": 1}},
        {"rank_pattern": {".*_proj": 2, "q_proj": 4}},
    ],
)
def test_a_pattern_of_no_adapted_layer_is_refused_with_the_nearest(settings):
    with pytest.raises(InputError, match=r"pattern: '(q_porj|lm_head|q_proj)' .*nearest: \w+"):
        attach_lora(tiny_base(), lora(**settings))


def test_patterns_give_the_ranks_and_scales_that_peft_gives():
    settings = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 8},
        "alpha_pattern": {"v_proj": 32, "layers.0.self_attn.q_proj": 1},
    }
    ours, twin = attach_lora(tiny_base(), lora(**settings)), get_peft_model(tiny_base(), lora(**settings))
    shapes = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()} == shapes
    layers = dict(twin.named_modules())
    for name, layer in ours.named_modules():
        if hasattr(layer, "scaling"):
            assert layer.scaling == layers[name].scaling
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"]) == (2, 0.5)


@pytest.mark.row("32")
@pytest.mark.parametrize(("names", "hint"), [(["nrom"], "norm"), (["embed_token"], "embed_tokens"), (["proj"], "proj")])
def test_a_module_to_save_that_no_module_is_named_is_refused_with_the_nearest(names, hint):
    with pytest.raises(InputError, match=f"no module is named.*nearest: .*{hint}"):
        attach_lora(tiny_base(), lora(modules_to_save=names))


def test_a_module_to_save_is_the_named_one_alone():
    """PEFT compares endings of letters: with "norm" it would train every norm of the model."""
    trained = check_trainable(attach_lora(tiny_base(), lora(modules_to_save=["norm"])))
    assert [n for n in trained if "lora_" not in n] == ["base_model.model.model.norm.modules_to_save.default.weight"]


@pytest.mark.row("45")
@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": [name]} for name in ("lm_head", "embed_tokens", "model")]
    + [{"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}],
)
def test_a_part_of_tied_embeddings_is_refused_with_the_way_out(settings):
    model = tiny_base(tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"tied.*trainable_tokens|head follows"):
        attach_lora(model, lora(**settings))
    assert not hasattr(model.lm_head, "modules_to_save")


@pytest.mark.row("45")
def test_an_adapter_that_brings_a_copy_of_tied_embeddings_is_refused():
    with pytest.warns(UserWarning, match="tied"):
        policy = get_peft_model(tiny_base(tie_word_embeddings=True), lora(modules_to_save=["embed_tokens"]))
    with pytest.raises(InputError, match=r"the embeddings is tied|the embeddings .*one tensor"):
        check_trainable(policy)


@pytest.mark.parametrize(
    ("names", "reason"),
    [(["act_fn"], "nothing to train"), (["layers"], "nothing to train"), (["layers.0.mlp", "up_proj"], "a part of")],
)
def test_modules_that_cannot_be_trained_in_full_are_refused(names, reason):
    with pytest.raises(InputError, match=reason):
        attach_lora(tiny_base(), lora(modules_to_save=names))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["up_proj"]}, {"exclude_modules": ["up_proj"]}])
def test_a_target_of_which_no_layer_is_left_is_refused(settings):
    with pytest.raises(InputError, match=r"'up_proj'.*trained in full.*excluded"):
        attach_lora(tiny_base(), lora(target_modules=["q_proj", "up_proj"], **settings))
    attach_lora(tiny_base(), lora(**settings))  # all the others


@pytest.mark.row("32")
def test_a_layer_named_in_full_contradicts_a_choice_of_layers():
    """PEFT gives it an adapter all the same."""
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(InputError, match=rf"{name} .*layers_to_transform"):
        attach_lora(tiny_base(), lora(target_modules=[name], layers_to_transform=[0]))
    trained = check_trainable(attach_lora(tiny_base(), lora(target_modules=["q_proj"], layers_to_transform=[1])))
    assert len(trained) == 2
    assert all(name in parameter for parameter in trained)


@pytest.mark.row("46")
@pytest.mark.parametrize("ids", [[97], [-1], {"embed_tokens": [3, 200]}, {"norm": [1]}])
def test_a_token_that_the_base_has_no_row_for_is_refused(ids):
    with pytest.raises(InputError, match=r"resize_token_embeddings|no place where"):
        attach_lora(tiny_base(), lora(trainable_token_indices=ids))


@pytest.mark.parametrize(
    ("settings", "reason"), [({"r": 3, "init_lora_weights": "orthogonal"}, "even"), ({"r": 0}, "0")]
)
def test_impossible_ranks_are_refused(settings, reason):
    with pytest.raises((InputError, ValueError), match=reason):
        attach_lora(tiny_base(), lora(**settings))
