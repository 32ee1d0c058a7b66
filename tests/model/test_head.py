"""The log-prob head in real models, those that scale or cap their logits among them."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from lorafocal.errors import InputError
from lorafocal.model.adapters import AdapterSwitch, add_frozen_copy, attach_lora
from lorafocal.model.head import causal_lm, install_head, scoring
from lorafocal.ops.logps import LogProbHead, token_logps_plain
from tests.tiny import SIZES, lora, tiny_base, tiny_policy

TRANSFORMED = {
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None),
}
IDS = torch.arange(2, 20)[None]
POSITIONS, LABELS = torch.tensor([3, 3, 8, 16]), torch.tensor([5, 6, 7, 96])


def model_of(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TRANSFORMED[name](), attn_implementation="eager").double()
    model.get_output_embeddings().weight.data *= 30
    return model.requires_grad_(False)


def wanted(model) -> torch.Tensor:
    return model(IDS).logits[0, POSITIONS].log_softmax(-1).gather(-1, LABELS[:, None]).squeeze(-1)


@pytest.mark.row("F11", "21")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_scaled_and_capped_logits_are_followed_exactly_and_the_model_is_left_as_it_was(name):
    """A head that ignored the transform would be tens of nats wrong."""
    model = model_of(name)
    expected, config = wanted(model), copy.deepcopy(model.config.to_dict())
    install_head(model)
    with scoring(model, LABELS):
        logps = model(IDS, logits_to_keep=POSITIONS).logits
    torch.testing.assert_close(logps[0], expected, rtol=0, atol=1e-9)
    assert model.config.to_dict() == config
    torch.testing.assert_close(wanted(model), expected, rtol=0, atol=0)


@pytest.mark.row("F11")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_models_own_transform_comes_back_after_an_error(name):
    model = model_of(name)
    expected = wanted(model)
    install_head(model)
    with pytest.raises(RuntimeError), scoring(model, LABELS):
        raise RuntimeError
    assert torch.equal(wanted(model), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_exchanging_the_class_changes_no_weight_no_tie_and_no_saved_file(tmp_path, tied):
    model = tiny_base(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "before")
    head = install_head(model)
    assert install_head(model) is head
    assert (head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(again.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.row("21")
def test_a_head_that_is_not_a_plain_linear_layer_is_refused():
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(tiny_base(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="output head"):
        install_head(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_trained_head_the_base_and_every_copy_score(dtype):
    """Original with the adapter off, copies with it: each by its own weights, and the trained one gets gradients."""
    policy = attach_lora(tiny_base(dtype=dtype), lora(modules_to_save=["lm_head"]))
    add_frozen_copy(policy)
    original = install_head(policy)
    wrapper = policy.get_base_model().get_output_embeddings()
    copies = wrapper.modules_to_save
    copies["default"].weight.data *= 1.5
    copies["reference"].weight.data *= 0.5
    switch, hidden = AdapterSwitch(policy), torch.randn(1, 20, 32, dtype=dtype)

    def scored() -> torch.Tensor:
        with scoring(policy, LABELS, rows=POSITIONS):
            return wrapper(hidden)[0]

    def by(weight: torch.Tensor) -> torch.Tensor:
        return token_logps_plain(hidden[0, POSITIONS], weight.to(dtype), LABELS)

    torch.testing.assert_close(scored(), by(copies["default"].weight), rtol=1e-5, atol=1e-5)
    with switch.to("reference"):
        torch.testing.assert_close(scored(), by(copies["reference"].weight), rtol=1e-5, atol=1e-5)
    with switch.off():
        torch.testing.assert_close(scored(), by(original.weight), rtol=1e-5, atol=1e-5)
    scored().sum().backward()
    assert copies["default"].weight.grad.abs().sum() > 0
    assert original.weight.grad is None
    assert copies["reference"].weight.grad is None


def test_wrappers_are_looked_through():
    policy = tiny_policy()
    inner = policy.get_base_model()

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert causal_lm(Engine(policy)) is causal_lm(policy) is causal_lm(inner) is inner
    assert isinstance(install_head(Engine(policy)), LogProbHead)
