"""References in a run: a continued adapter starts at identity, a copy is never trained or saved, resuming is exact."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.objectives.focal import identity_loss
from lorafocal.trainer import FocalPOTrainer
from tests.model.families import random_model
from tests.tiny import CONFIGS, SIZES, disturb, lora, pairs, tiny_base, tiny_policy, trainer

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "lorafocal.json", "README.md"}


@pytest.mark.row("1")
@pytest.mark.parametrize(("objective", "loss"), [("focalpo", identity_loss(0.05)), ("dpo", math.log(2))])
def test_a_continued_adapter_starts_at_the_identity_loss(tmp_path, objective, loss):
    run = trainer(tmp_path, pairs(12), model=tiny_policy(), reference="frozen_copy", objective=objective, max_steps=2)
    run.train()
    first, second, *_ = run.state.log_history
    assert first["loss"] == pytest.approx(loss, abs=1e-7)
    assert (first["rewards/ties"], first["focal/chosen_fell_share"]) == (1.0, 0.0)
    assert first["logps/reference_chosen"] == first["logps/chosen"]
    assert second["rewards/ties"] == 0.0


def named(model, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


@pytest.mark.row("F17", "3")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_copy_is_never_trained_and_the_policy_is(tmp_path, checkpointing):
    from lorafocal.training_fields import installed_fields

    prefix = "activation" if "activation_checkpointing" in installed_fields() else "gradient"
    settings = {f"{prefix}_checkpointing": True} if checkpointing else {}
    run = trainer(tmp_path, pairs(12), model=tiny_policy(), reference="frozen_copy", max_steps=3, **settings)
    copies, own = named(run.model, ".reference."), named(run.model, ".default.")
    assert len(copies) == len(own) == len(run.trained)
    assert all(torch.equal(c, o) for c, o in zip(copies.values(), own.values(), strict=True))

    class Trained(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(run.trained)

    run.add_callback(Trained())
    run.train()
    assert all(torch.equal(copies[n], p) for n, p in named(run.model, ".reference.").items())
    assert not any(torch.equal(own[n], p) for n, p in run.trained.items())


@pytest.mark.row("8", "52")
@pytest.mark.parametrize("name", ["default", "sft"])
def test_only_the_policys_adapter_is_saved(tmp_path, name):
    tiny_base().save_pretrained(tmp_path / "base")
    start = tiny_policy()
    start.save_pretrained(tmp_path / "start")
    base = type(tiny_base()).from_pretrained(tmp_path / "base").requires_grad_(False)
    model = PeftModel.from_pretrained(base, tmp_path / "start", adapter_name=name, is_trainable=True)
    run = trainer(tmp_path / "run", pairs(8), model=model, reference="frozen_copy", max_steps=1, save_strategy="steps")
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-1" / "adapter"):
        assert {file.name for file in folder.iterdir()} == ADAPTER_FILES
        assert not [key for key in load_file(folder / "adapter_model.safetensors") if "reference" in key]
    assert set(load_file(tmp_path / "run" / "checkpoint-1" / "parameters.safetensors")) == set(run.trained)


SETTINGS = {"reference": "frozen_copy", "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "pairs_per_step": 5}


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> FocalPOTrainer:
    """A run that nobody stopped."""
    run = trainer(tmp_path_factory.mktemp("whole"), pairs(13), model=tiny_policy(), **SETTINGS)
    run.train()
    return run


@pytest.mark.slow
@pytest.mark.row("55", "1")
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopped_and_resumed_the_reference_is_still_the_start_and_the_bits_are_the_same(tmp_path, whole, stop):
    data = pairs(13)
    first = trainer(tmp_path / "cut", data, model=tiny_policy(), **SETTINGS)
    first.add_callback(StopAfter(stop))
    first.train()
    assert first.state.global_step == stop
    resumed = trainer(tmp_path / "cut", data, model=tiny_policy(), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, whole.trained[n]) for n, p in resumed.trained.items())
    logs = [
        {
            entry["step"]: (entry["loss"], entry["logps/reference_chosen"])
            for entry in r.state.log_history
            if "loss" in entry
        }
        for r in (whole, resumed)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.row("55", "1")
def test_resuming_with_another_start_is_refused(tmp_path):
    """The usual slip: the checkpoint's own adapter is loaded, and would become the reference."""
    data = pairs(13)
    first = trainer(tmp_path, data, model=tiny_policy(), **SETTINGS)
    first.add_callback(StopAfter(2))
    first.train()
    slipped = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-2" / "adapter", is_trainable=True)
    with pytest.raises(InputError, match=r"not the one that this run began with.*the run started from"):
        trainer(tmp_path, data, model=slipped, **SETTINGS).train(resume_from_checkpoint=True)
    other = trainer(tmp_path, data, model=tiny_policy(), **(SETTINGS | {"reference": "disabled_adapter"}))
    with pytest.raises(InputError, match="trained with reference frozen_copy, this run has disabled_adapter"):
        other.train(resume_from_checkpoint=True)


def separate(folder, data, ref_model, **settings) -> FocalPOTrainer:
    defaults = {"reference": "separate_model", "max_steps": 2, "ref_model": ref_model}
    return trainer(folder, data, **(defaults | settings))


@pytest.mark.slow
@pytest.mark.row("7")
def test_a_separate_model_is_a_reference_that_is_neither_trained_nor_saved(tmp_path):
    """The base given twice is what switching the adapter off gives, to the last bit."""
    run = separate(tmp_path / "a", pairs(12), tiny_base(), identity_probe=True, save_strategy="steps", save_steps=2)
    before = {n: p.clone() for n, p in run.ref_model.state_dict().items()}
    run.train()
    assert all(torch.equal(p, before[n]) for n, p in run.ref_model.state_dict().items())
    assert not any(p.requires_grad for p in run.ref_model.parameters())
    assert not run.ref_model.training
    assert {f.name for f in (tmp_path / "a" / "checkpoint-2").iterdir()} >= {"adapter", "parameters.safetensors"}
    assert set(load_file(tmp_path / "a" / "checkpoint-2" / "parameters.safetensors")) == set(run.trained)
    twin = trainer(tmp_path / "b", pairs(12), max_steps=2)
    twin.train()
    assert all(torch.equal(p, twin.trained[n]) for n, p in run.trained.items())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_another_model_of_the_family_is_a_legal_reference_without_the_probe(tmp_path, layout):
    larger = {**SIZES, "num_hidden_layers": 3, "hidden_size": 48}
    other = type(tiny_base())(type(CONFIGS["llama"]())(**larger))
    run = separate(tmp_path, pairs(12), other, layout=layout)
    run.train()
    first = run.state.log_history[0]
    assert first["rewards/ties"] == 0.0
    assert first["logps/reference_chosen"] != first["logps/chosen"]


@pytest.mark.row("7")
def test_a_reference_that_cannot_be_right_is_refused(tmp_path):
    base = tiny_base()
    with pytest.raises(InputError, match=r"own base.*disabled_adapter"):
        separate(tmp_path, pairs(4), base, model=base, peft_config=lora())
    sizes = {**SIZES, "vocab_size": 101}
    with pytest.raises(InputError, match="101 embeddings, the policy 97"):
        separate(tmp_path, pairs(4), type(base)(type(base.config)(**sizes)))
    with pytest.raises(InputError, match=r"pass `ref_model`"):
        separate(tmp_path, pairs(4), None)
    with pytest.raises(InputError, match=r"not the policy's starting point.*same dtype"):
        separate(tmp_path, pairs(4), disturb(tiny_policy()), identity_probe=True).train()


@pytest.mark.slow
@pytest.mark.row("55", "1")
def test_resuming_with_another_separate_model_is_refused(tmp_path):
    data, settings = pairs(13), SETTINGS | {"reference": "separate_model"}
    first = separate(tmp_path, data, tiny_base(), **settings)
    first.add_callback(StopAfter(2))
    first.train()
    other = tiny_base()
    with torch.no_grad():
        other.lm_head.weight += 1e-3
    with pytest.raises(InputError, match=r"ref_model is not the one that this run began with"):
        separate(tmp_path, data, other, **settings).train(resume_from_checkpoint=True)
    separate(tmp_path, data, tiny_base(), **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.row("14", "1")
@pytest.mark.parametrize("reference", ["frozen_copy", "disabled_adapter"])
def test_dropout_that_is_allowed_is_the_policys_alone(tmp_path, reference):
    """In the base's layers and in the adapter's: the reference is the same in every step, and what it is without."""
    still = trainer(tmp_path / "still", pairs(8), model=noisy(reference), reference=reference, layout="padded")
    run = trainer(
        tmp_path, pairs(8), pairs(5), model=noisy(reference), reference=reference, layout="padded", allow_dropout=True
    )
    for one in (still, run):
        one.train()
    expected, logged = (
        [entry["logps/reference_chosen"] for entry in one.state.log_history if "loss" in entry] for one in (still, run)
    )
    assert logged == pytest.approx(expected, abs=1e-5)
    assert run.state.log_history[0]["rewards/ties"] == 0.0  # the policy has its noise
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def noisy(reference: str) -> PeftModel:
    """A policy with dropout in base and adapter, away from the base only where that is not the reference."""
    policy = attach_lora(random_model("gpt2", torch.float32), lora(lora_dropout=0.3))
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.1 for m in policy.modules())
    return disturb(policy) if reference == "frozen_copy" else policy


@pytest.mark.slow
def test_a_second_training_counts_from_its_own_start(tmp_path):
    run = trainer(tmp_path, pairs(8), max_steps=1, logging_steps=2, identity_probe=False)
    run.train()
    run.train()
    assert run.pairs_seen == run.metrics.num_pairs == 8


@pytest.mark.row("1", "4")
def test_several_adapters_are_refused_with_the_way_out(tmp_path):
    policy = tiny_policy()
    policy.add_adapter("second", lora(target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"2 adapters .default, second.*lorafocal merge"):
        trainer(tmp_path, pairs(4), model=policy, reference="frozen_copy")
    policy = PeftModel(tiny_base(), lora(target_modules=["q_proj"]), adapter_name="reference")
    with pytest.raises(InputError, match="name of a frozen copy"):
        trainer(tmp_path, pairs(4), model=policy, reference="frozen_copy")
