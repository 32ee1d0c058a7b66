"""FocalPOConfig: TrainingArguments with every field honoured or refused."""

from __future__ import annotations

import os

import pytest

from lorafocal.arguments import FocalPOConfig
from lorafocal.errors import InputError


def config(folder, **settings) -> FocalPOConfig:
    return FocalPOConfig(output_dir=str(folder), use_cpu=True, **settings)


def test_defaults_are_a_usable_run(tmp_path):
    args = config(tmp_path)
    assert (args.objective, args.beta, args.gamma) == ("focalpo", 0.1, 0.05)
    assert (args.layout, args.reference, args.num_train_epochs) == ("auto", "disabled_adapter", 1)
    assert args.n_gpu <= 1


@pytest.mark.row("F6", "12")
def test_the_filter_that_hides_nan_is_off_and_cannot_be_turned_on(tmp_path):
    assert config(tmp_path).logging_nan_inf_filter is False
    assert config(tmp_path, logging_nan_inf_filter=True).logging_nan_inf_filter is False  # transformers' default


@pytest.mark.row("12", "15", "32")
@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("fp16", True, "bfloat16"),
        ("bf16", True, "dtype"),
        ("gradient_accumulation_steps", 4, "pairs_per_step"),
        ("per_device_train_batch_size", 16, "pairs_per_step"),
        ("label_smoothing_factor", 0.1, "cross-entropy"),
        ("auto_find_batch_size", True, "packing"),
        ("torch_compile", True, "segment"),
        ("load_best_model_at_end", True, "score"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_with_the_way_out(tmp_path, name, value, way_out):
    with pytest.raises(InputError, match=way_out) as refusal:
        config(tmp_path, **{name: value})
    assert name in str(refusal.value)


def test_deepspeed_has_no_choice_of_device_to_tell_of_on_a_cpu(tmp_path, monkeypatch):
    """accelerate imports it in every run where it is installed."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    config(tmp_path)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_all_refusals_come_at_once(tmp_path):
    with pytest.raises(InputError) as refusal:
        config(tmp_path, fp16=True, neftune_noise_alpha=5.0)
    assert "fp16" in str(refusal.value)
    assert "neftune_noise_alpha" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"beta": 0.0}, "beta"),
        ({"objective": "ppo"}, "objective"),
        ({"pairs_per_step": 0}, "pairs_per_step"),
        ({"pairs_per_step": 2.5}, "pairs_per_step is 2.5; a step needs whole pairs"),
        ({"num_train_epochs": 0}, "num_train_epochs: found 0"),
        ({"learning_rate": -1e-6}, "learning_rate: found -1e-06"),
        ({"reference": "second_model"}, "disabled_adapter, frozen_copy, separate_model"),
        ({"recompute": "some"}, "recompute is 'some'; choose one of auto, none, mlp, full"),
        ({"recompute": "mlp", "gradient_checkpointing": True}, "but recompute is 'mlp': keep one"),
        ({"adapter_kernels": "cuda"}, "adapter_kernels is 'cuda'; choose one of auto, peft"),
        ({"elementwise_kernels": "auto"}, "elementwise_kernels is 'auto'; choose one of torch, triton"),
        ({"tokens_per_pack": 0}, "tokens_per_pack is 0"),
        ({"reference_store": "there"}, "reference_store is for reference='cached'"),
        ({"layout": "loose"}, "auto, packed, padded"),
        ({"objective": "dpo", "gamma": 0.1}, "dpo has no gamma"),
        ({"objective": "sft", "beta": 0.1, "reference": "frozen_copy"}, "sft has no beta and no reference"),
        ({"objective": "sft", "identity_probe": False}, "sft has no identity_probe"),
    ],
)
def test_our_own_fields_are_checked(tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "settled"),
    [
        ({}, (0.1, 0.05, "disabled_adapter", True)),
        ({"objective": "dpo", "beta": 0.3}, (0.3, None, "disabled_adapter", True)),
        ({"objective": "sft"}, (None, None, None, None)),
        ({"reference": "frozen_copy"}, (0.1, 0.05, "frozen_copy", True)),
        ({"reference": "separate_model"}, (0.1, 0.05, "separate_model", False)),
        ({"reference": "separate_model", "identity_probe": True}, (0.1, 0.05, "separate_model", True)),
    ],
)
def test_what_is_left_out_is_settled_by_objective_and_reference(tmp_path, settings, settled):
    args = config(tmp_path, **settings)
    assert (args.beta, args.gamma, args.reference, args.identity_probe) == settled


SCHEDULES = {
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-7},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 1000},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-7, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 100_000, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
}


def test_every_schedule_that_can_be_computed_is_taken(tmp_path):
    from lorafocal.training_fields import SCHEDULES as KNOWN

    assert SCHEDULES.keys() == KNOWN.keys()
    for name, settings in SCHEDULES.items():
        FocalPOConfig(output_dir=str(tmp_path), lr_scheduler_type=name, lr_scheduler_kwargs=settings, use_cpu=True)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("polynomial", {"lr_end": 1.0}, r"must be smaller than initial lr"),
        ("polynomial", {"power": "two"}, r"unsupported operand"),
        ("polynomial", {"power": -2.0}, r"negative power"),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "square"}, r"Unknown decay type: square"),
        ("polynomial", {"lr_end": -1.0}, r"a rate of -"),
        ("cosine_with_min_lr", {"min_lr": "low"}, r"unsupported operand"),
    ],
)
def test_a_schedule_that_cannot_be_computed_is_refused_before_a_model_is_loaded(tmp_path, name, settings, said):
    with pytest.raises(InputError, match=rf"^lr_scheduler_kwargs: {name} cannot be computed with .*{said}"):
        FocalPOConfig(output_dir=str(tmp_path), lr_scheduler_type=name, lr_scheduler_kwargs=settings, use_cpu=True)
