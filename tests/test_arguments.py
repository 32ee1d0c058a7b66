"""FocalPOConfig: TrainingArguments with every field honoured or refused."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle

import pytest
from transformers import HfArgumentParser

from lorafocal.arguments import FocalPOConfig, _OfTheEngine
from lorafocal.errors import InputError
from lorafocal.trainer import FocalPOTrainer
from lorafocal.training_fields import RULES, installed_fields
from tests.tiny import lora, pairs, tiny_base


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
        ({"pairs_per_step": 2.5}, "pairs_per_step is 2.5; it takes int: pairs of one optimiser step"),
        ({"allow_dropout": "no"}, "allow_dropout is 'no'; it takes bool: keep dropout on"),
        ({"keep_order": "no"}, "keep_order is 'no'; it takes bool"),
        ({"identity_probe": "no"}, r"identity_probe is 'no'; it takes bool \| None"),
        ({"compile_layers": "yes"}, "compile_layers is 'yes'; it takes bool"),
        ({"tokens_per_pack": True}, r"tokens_per_pack is True; it takes int \| None"),
        ({"tokens_per_pack": 2.5}, r"tokens_per_pack is 2.5; it takes int \| None"),
        ({"loraplus_lr_ratio": True}, r"loraplus_lr_ratio is True; it takes float \| None"),
        ({"loraplus_lr_ratio": "x"}, r"loraplus_lr_ratio is 'x'; it takes float \| None"),
        ({"loraplus_lr_ratio": float("inf")}, "loraplus_lr_ratio is inf; it takes float"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio is 0.5; LoRA"),
        ({"objective": ["dpo"]}, r"objective is \['dpo'\]; it takes str"),
        ({"reference": ["frozen_copy"]}, r"reference is \['frozen_copy'\]; it takes str \| None"),
        ({"max_length": None}, "max_length is None; it takes int"),
        ({"max_length": "x"}, "max_length is 'x'; it takes int"),
        ({"max_length": 0}, "max_length is at least 2 tokens"),
        ({"max_prompt_length": 9}, "max_prompt_length has no effect with truncation: drop"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'; it takes a mapping, or one JSON object as text"),
        ({"focal": '{"gamma": '}, "focal is .*; it takes a mapping, or one JSON object as text"),
        ({"keep_order": 1, "max_length": 2.0}, r"keep_order is 1.*\nmax_length is 2.0"),
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
    ("word", "says"),
    [
        ("rpo_alpha", "objective='irpo', nll_weight"),
        ("evaluation_strategy", "say eval_strategy"),
        ("group_by_length", "packs hold no padding"),
        ("learning_rat", "no such argument; did you mean learning_rate?"),
        ("zzz", "no such argument$"),
    ],
)
def test_words_that_are_no_argument_are_answered_with_what_to_say(tmp_path, word, says):
    with pytest.raises(InputError, match=rf"{word}: .*{says}"):
        config(tmp_path, **{word: 0.1})


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logging_steps": 1, "logging_strategy": "no"}, "logging_steps: it has no effect"),
        ({"logging_steps": 1, "logging_strategy": "epoch"}, "logging_steps: it has no effect"),
        ({"eval_delay": 3}, "eval_delay: nothing is evaluated"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers: there are no workers"),
        ({"gradient_checkpointing_kwargs": {}}, "no effect under recompute auto"),
        ({"gradient_checkpointing_kwargs": {"early_stop": True}, "recompute": "mlp"}, "no effect under recompute mlp"),
        ({"gradient_checkpointing_kwargs": "x", "gradient_checkpointing": True}, "is 'x'; it takes a mapping"),
        ({"gradient_checkpointing_kwargs": {"a": 1}, "gradient_checkpointing": True}, "keys of .*use_reentrant"),
    ],
)
def test_what_would_be_ignored_or_fail_in_the_first_step_is_refused(tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        config(tmp_path, **settings)


def test_what_has_an_effect_is_taken(tmp_path):
    settings = {"use_reentrant": False, "determinism_check": "none"}
    assert config(tmp_path, recompute="full", gradient_checkpointing_kwargs=settings).recompute == "full"
    assert config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings).recompute == "full"
    args = config(tmp_path, num_train_epochs=3, max_steps=2)  # the latter decides, as transformers says
    assert (args.num_train_epochs, args.max_steps) == (3, 2)


# ---- scripts


SAID = [
    "--use_cpu", "true", "--objective", "dpo", "--focal", '{"form": "eq3", "gamma": 0.1}', "--keep_order",
    "--chat_template_kwargs", '{"enable_thinking": false}', "--reference", "several",
    "--reference_members", "base", "there", "--reference_weights", "adaptive",
]  # fmt: skip


def check_said(args: FocalPOConfig) -> None:
    assert (args.focal, args.chat_template_kwargs) == ({"form": "eq3", "gamma": 0.1}, {"enable_thinking": False})
    assert (args.keep_order, args.allow_dropout, args.debug) == (True, False, [])
    assert (args.reference_members, args.reference_weights) == (["base", "there"], "adaptive")


def test_a_script_s_parser_makes_a_config(tmp_path):
    plain, *_ = HfArgumentParser(FocalPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "true"], look_for_args_file=False
    )
    assert plain == config(tmp_path)
    said = ["--output_dir", str(tmp_path), *SAID]
    check_said(HfArgumentParser(FocalPOConfig).parse_args_into_dataclasses(said, look_for_args_file=False)[0])


def test_trl_s_parser_makes_a_config(tmp_path):
    parser = pytest.importorskip("trl").TrlParser(FocalPOConfig)
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.3\nmax_steps: 5\n")
    [args] = parser.parse_args_and_config(["--config", str(file), "--output_dir", str(tmp_path), *SAID])
    check_said(args)
    assert (args.beta, args.max_steps) == (0.3, 5)


# ---- copies


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "sft"},
        {"reference": "moving", "eval_strategy": "steps"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}', "report_to": "none"},
        {"objective": "dpo", "focal": {"form": "eq3", "gamma": 0.1}, "max_steps": 3, "num_train_epochs": 2},
    ],
)
def test_a_copy_is_equal_and_may_change_a_field(tmp_path, settings):
    args = config(tmp_path, **settings)
    assert dataclasses.replace(args) == FocalPOConfig(**args.to_dict()) == args
    assert copy.deepcopy(args) == pickle.loads(pickle.dumps(args)) == args
    assert dataclasses.replace(args, weight_decay=0.1) == config(tmp_path, **settings, weight_decay=0.1) != args


def test_a_copy_is_checked_as_a_new_config(tmp_path):
    assert dataclasses.replace(config(tmp_path), gamma=0.1) == config(tmp_path, gamma=0.1)
    with pytest.raises(InputError, match="fp16"):
        dataclasses.replace(config(tmp_path), fp16=True)
    with pytest.raises(InputError, match=r"accelerator_config: found .*'split_batches': True"):
        config(tmp_path, accelerator_config={"split_batches": True})
    with pytest.raises(InputError, match="do_eval: found True"):
        config(tmp_path, do_eval=True)
    evaluates = config(tmp_path, eval_strategy="epoch")
    with pytest.raises(InputError, match="say do_eval=False too"):
        dataclasses.replace(evaluates, eval_strategy="no")
    assert dataclasses.replace(evaluates, eval_strategy="no", do_eval=False) == config(tmp_path)


def test_an_engine_s_own_deepspeed_config_is_nobody_s_choice(tmp_path):
    args = config(tmp_path)
    args.deepspeed = _OfTheEngine({"zero_optimization": {"stage": 2}})
    args.build_objective()
    assert dataclasses.replace(args) == config(tmp_path)  # which makes its own, for the engine it has
    args.deepspeed = dict(args.deepspeed)
    with pytest.raises(InputError, match="deepspeed: found"):
        args.build_objective()


# ---- what is set on a config that is made


@pytest.mark.row("15", "32")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda args: args.set_training(batch_size=1, gradient_accumulation_steps=4), "accumulation_steps: found 4"),
        (lambda args: args.set_training(batch_size=8), "per_device_train_batch_size: found 8.* use pairs_per_step"),
        (lambda args: args.set_dataloader(drop_last=True), "dataloader_drop_last: found True"),
        (lambda args: args.set_optimizer("adafactor"), "optim: found 'adafactor'"),
        (lambda args: args.set_push_to_hub("me/mine"), "a run never uploads"),
        (lambda args: setattr(args, "logging_nan_inf_filter", True), "logging_nan_inf_filter: found True"),
        (lambda args: setattr(args, "pairs_per_step", 0), "pairs_per_step is 0"),
        (lambda args: setattr(args, "allow_dropout", "no"), "allow_dropout is 'no'"),
    ],
)
def test_what_was_set_since_is_checked_where_a_trainer_takes_it(tmp_path, change, words):
    args = config(tmp_path)
    args.build_objective()
    change(args)
    with pytest.raises(InputError, match=rf"(?s)changed since it was made.*FocalPOConfig\(\.\.\.\).*{words}"):
        args.build_objective()


def test_what_may_be_set_since_is_taken(tmp_path):
    args = config(tmp_path).set_optimizer("sgd", learning_rate=1e-3).set_lr_scheduler("cosine").set_save("epoch")
    args.gamma = 0.2
    assert args.build_objective().parameters == {"beta": 0.1, "gamma": 0.2}


def test_a_trainer_looks_at_what_was_set_since(tmp_path):
    args = config(tmp_path, recompute="full", tokens_per_pack=64)
    for _ in range(2):  # the second takes it as the first one left it
        FocalPOTrainer(tiny_base(), args=args, train_dataset=pairs(8), peft_config=lora())
    args.gradient_accumulation_steps = 4
    with pytest.raises(InputError, match="gradient_accumulation_steps: found 4"):
        FocalPOTrainer(tiny_base(), args=args, train_dataset=pairs(8), peft_config=lora())


def test_what_transformers_5_5_makes_of_fsdp_left_alone_is_nobody_s_choice(tmp_path):
    args = config(tmp_path)
    args.fsdp = []
    args.fsdp_config = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}
    args.build_objective()
    dataclasses.replace(args, beta=0.2).build_objective()
    args.fsdp_config["xla"] = True
    with pytest.raises(InputError, match="fsdp_config: found"):
        args.build_objective()


@pytest.mark.skipif("warmup_ratio" in installed_fields(), reason="this transformers still has the field")
def test_a_field_that_transformers_no_longer_has_is_refused_with_its_way_out(tmp_path):
    with pytest.raises(InputError, match=r"warmup_ratio: gone from transformers; warmup_steps below 1 is the same"):
        FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, warmup_ratio=0.1)


def test_what_a_trainer_has_read_cannot_be_changed_behind_it(tmp_path):
    settings = config(tmp_path, max_steps=1, save_strategy="no")
    run = FocalPOTrainer(tiny_base(), args=settings, train_dataset=pairs(4), peft_config=lora())
    run.args.beta = 0.5
    with pytest.raises(InputError, match=r"args\.beta was changed after the trainer was made"):
        run.train()
    run.args.beta, run.args.learning_rate = 0.1, 1e-4
    assert run.train().global_step == 1


def test_every_field_is_read_once_or_when_it_is_needed(tmp_path):
    """One that is neither would be changed behind the trainer, and ignored."""
    run = FocalPOTrainer(tiny_base(), args=config(tmp_path, max_steps=1), train_dataset=pairs(4), peft_config=lora())
    later = {"pairs_per_step", "keep_order", "identity_probe", "loraplus_lr_ratio"}
    for name in FocalPOConfig.__annotations__.keys() - RULES.keys() - later:
        before = getattr(run.args, name)
        setattr(run.args, name, "another")
        with pytest.raises(InputError, match=rf"args\.{name} was changed after the trainer was made"):
            run.train()
        setattr(run.args, name, before)


def test_a_store_that_is_changed_behind_a_trainer_is_not_filled_in_its_place(tmp_path):
    settings = config(tmp_path, reference="cached", reference_store=str(tmp_path / "first"))
    run = FocalPOTrainer(tiny_base(), args=settings, train_dataset=pairs(4), peft_config=lora())
    run.args.reference_store = str(tmp_path / "second")
    with pytest.raises(InputError, match=r"args\.reference_store was changed after the trainer was made"):
        run.cache_reference()
    assert not (tmp_path / "first").exists()
