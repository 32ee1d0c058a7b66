"""Adapters in the layers of a model that is no `PeftModel`: refused, and taken out where a constructor left them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import EarlyStoppingCallback

from lorafocal.arguments import FocalPOConfig
from lorafocal.errors import InputError
from lorafocal.model.adapters import adapter_layers
from lorafocal.model.loose import take_out
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import lora, pairs, tiny_base, tiny_policy, trainer

pytestmark = pytest.mark.slow

EVERY: dict[str, dict[str, Any]] = {
    "every weight": {"reference": "cached"},
    "no reference": {"objective": "simpo"},
    "disabled_adapter": {},
    "frozen_copy": {"reference": "frozen_copy"},
    "peft_config": {"peft_config": lora()},
}


def added():
    """As transformers' own `add_adapter` leaves a model."""
    model = tiny_base()
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize("what", EVERY)
@pytest.mark.parametrize("origin", [added, lambda: tiny_policy().get_base_model()])
def test_an_adapter_without_a_peft_model_is_refused_with_the_ways_out(tmp_path, origin, what):
    """It would be trained in full, adapter and all, and saved as a model that nobody can load."""
    with pytest.raises(
        InputError, match="model is LlamaForCausalLM, no PeftModel, and yet holds an adapter"
    ) as refusal:
        trainer(tmp_path, pairs(3), model=origin(), **EVERY[what])
    assert "PeftModel.from_pretrained(base, folder, is_trainable=True)" in str(refusal.value)
    assert "`unload()`" in str(refusal.value)


def test_deleting_an_adapter_leaves_its_layers(tmp_path):
    """So transformers' `delete_adapter` is no way out: the tensors would be saved under PEFT's names."""
    model = added()
    model.delete_adapter("default")
    with pytest.raises(InputError, match="holds an adapter"):
        trainer(tmp_path, pairs(3), model=model, reference="cached")


def test_a_base_that_pissa_has_changed_is_to_be_loaded_again(tmp_path):
    base = get_peft_model(tiny_base(), lora(init_lora_weights="pissa")).get_base_model()
    with pytest.raises(InputError, match="load the base again: the start 'pissa' has changed its weights"):
        trainer(tmp_path, pairs(3), model=base, reference="cached")


def test_the_ways_out_lead_out(tmp_path):
    first = trainer(tmp_path / "a", pairs(8), max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    base = first.model.get_base_model()
    with pytest.raises(InputError, match=r"trainer\.model\.unload"):
        trainer(tmp_path / "b", pairs(3), model=base, peft_config=lora())
    assert first.model.unload() is base
    trainer(tmp_path / "b", pairs(8), model=base, peft_config=lora(), max_steps=1).train()
    policy = PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter", is_trainable=True)
    trainer(tmp_path / "c", pairs(8), model=policy, reference="frozen_copy", max_steps=1).train()


def test_a_reference_with_an_adapter_that_nobody_named_is_refused(tmp_path):
    """The base of an earlier training would stand for itself, and answer as what was trained on it."""
    separate = {"reference": "separate_model", "model": tiny_base(), "peft_config": lora()}
    with pytest.raises(InputError, match="ref_model is LlamaForCausalLM, no PeftModel"):
        trainer(tmp_path, pairs(3), ref_model=tiny_policy().get_base_model(), **separate)
    trainer(tmp_path, pairs(3), ref_model=tiny_policy(), **separate)


def started(folder, base, **settings):
    """A trainer with a fresh adapter, or that of `config`; beside settings, `callbacks` and `ref_model`."""
    callbacks, ref_model = settings.pop("callbacks", ()), settings.pop("ref_model", None)
    config = settings.pop("config", None) or lora()
    usual = {"pairs_per_step": 8, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "tokens_per_pack": 64}
    return FocalPOTrainer(
        base,
        ref_model,
        args=FocalPOConfig(output_dir=str(folder), use_cpu=True, report_to="none", **usual | settings),
        train_dataset=pairs(8),
        peft_config=config,
        callbacks=callbacks,
    )


FAILING: dict[str, Any] = {
    "nothing to evaluate on": lambda base: {"eval_strategy": "steps", "eval_steps": 1},
    "kernels": lambda base: {"adapter_kernels": "peft", "recompute": "mlp"},
    "a callback": lambda base: {"callbacks": [EarlyStoppingCallback(2)]},
    "the reference": lambda base: {"reference": "separate_model", "ref_model": base},
}


@pytest.mark.parametrize("what", FAILING)
def test_a_constructor_that_fails_gives_the_base_back(tmp_path, what):
    """And the next one on it trains what it would have trained on a fresh base."""
    base = tiny_base().requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with pytest.raises(ValueError):  # noqa: PT011 - transformers' own, or an InputError
        started(tmp_path, base, **FAILING[what](base))
    assert not adapter_layers(base)
    assert not hasattr(base, "peft_config")
    now = dict(base.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) and now[name].requires_grad for name in before)
    runs = [started(tmp_path / name, model) for name, model in (("again", base), ("fresh", tiny_base()))]
    for run in runs:
        run.train()
    again, fresh = (run.trained for run in runs)
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def test_a_constructor_that_fails_leaves_an_adapter_that_changed_the_base(tmp_path):
    """Without it, what is left of the base would pass for the base."""
    base = tiny_base()
    config = lora(init_lora_weights="pissa")
    with pytest.raises(InputError, match="EarlyStopping"):
        started(tmp_path, base, config=config, reference="frozen_copy", callbacks=[EarlyStoppingCallback(2)])
    with pytest.raises(InputError, match="load the base again: the start 'pissa'"):
        started(tmp_path, base)


PLAIN: list[dict[str, Any]] = [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [3]}]


@pytest.mark.parametrize(
    ("settings", "tied"),
    [(settings, tied) for settings in PLAIN for tied in (False, True)] + [({"modules_to_save": ["lm_head"]}, False)],
)
def test_taken_out_is_what_peft_unloads(settings, tied):
    ours, theirs = (tiny_base(tie_word_embeddings=tied) for _ in range(2))
    get_peft_model(ours, lora(**settings))
    take_out(ours)
    unloaded = get_peft_model(theirs, lora(**settings)).unload()
    assert [(name, type(module)) for name, module in ours.named_modules()] == [
        (name, type(module)) for name, module in unloaded.named_modules()
    ]
    assert vars(ours).keys() == vars(unloaded).keys() - {"peft_config"}  # that PEFT 0.18 leaves behind
    assert ours.state_dict().keys() == unloaded.state_dict().keys()
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
