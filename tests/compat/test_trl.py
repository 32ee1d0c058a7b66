"""From TRL: every field of the installed `DPOConfig` and every key of `trl dpo` has one fate, and keeps it."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig

from lorafocal import FocalPOTrainer, InputError, load_config
from lorafocal.arguments import FocalPOConfig
from lorafocal.compat import trl
from lorafocal.compat.trl import focalpo_config
from lorafocal.compat.trl_fields import FATES, Given, fate_of, translate
from lorafocal.compat.trl_yaml import _NO_EFFECT, _PLACES, _REFUSED, PARTS, Options, config_from_trl, yaml_from_trl
from lorafocal.run import train
from lorafocal.training_fields import LOGGERS
from tests.test_parity_trl import Trace, rows, theirs, trained, word_tokenizer
from tests.tiny import disturb, lora, relative_difference, tiny_base
from tests.toy_run import metric_lines, write_inputs

pytestmark = pytest.mark.slow

FIELDS = [spec.name for spec in fields(DPOConfig)]
OF_KIND = {
    kind: [name for name in FIELDS if (fate := fate_of(name)) and fate.kind == kind]
    for kind in ("translated", "no_effect", "refused")
}

# What a field needs beside it, and its other value where adding 1 or switching it over would not do.
BESIDE: dict[str, dict[str, Any]] = {
    "eval_steps": {"eval_strategy": "steps"},
    "eval_delay": {"eval_strategy": "epoch"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "warmup_ratio": {"warmup_steps": 0},
    "ref_model_mixup_alpha": {"sync_ref_model": True},
    "ref_model_sync_steps": {"sync_ref_model": True},
}
OTHER: dict[str, Any] = {
    "ref_model_mixup_alpha": 0.5,
    "output_dir": "elsewhere", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2},
    "optim": "sgd", "tf32": False, "max_steps": 7, "eval_steps": 7, "save_total_limit": 7, "data_seed": 7,
    "dataloader_prefetch_factor": 7, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": True,
    "logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": "epoch", "log_level": "error",
    "log_level_replica": "error", "report_to": ["tensorboard"], "warmup_ratio": 0.1, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "activation_checkpointing": False, "bf16": True,
}  # fmt: skip


def dpo_config(**settings: Any) -> DPOConfig:
    return DPOConfig(**{"output_dir": "out", "use_cpu": True, "bf16": False} | settings)


def other(name: str, value: Any) -> Any:
    """A value that the field does not have."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "something else"


def outcome(config: FocalPOConfig) -> dict[str, str]:
    """What decides a run: all values, as text; machinery that holds addresses left out."""
    return {name: repr(value) for name, value in vars(config).items() if name not in ("distributed_state", "_n_gpu")}


@pytest.fixture(autouse=True)
def every_logger_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS, "tensorboard", ("torch",))


# ---- DPOConfig


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_of_the_installed_dpo_config_is_classed(name: str) -> None:
    fate = fate_of(name)
    assert fate is not None, f"{name} is new in TRL or transformers: class it in lorafocal.compat.trl_fields"
    assert fate.kind == "translated" or fate.reason


@pytest.mark.row("32")
@pytest.mark.parametrize("name", sorted({*OF_KIND["translated"]} - {"truncation_mode", "ddp_backend"}))
def test_a_translated_field_changes_the_result(name: str, caplog: pytest.LogCaptureFixture) -> None:
    before = focalpo_config(dpo_config(**BESIDE.get(name, {})))
    said = [record.message for record in caplog.records]
    caplog.clear()
    changed = {name: other(name, getattr(dpo_config(), name))}
    after = focalpo_config(dpo_config(**BESIDE.get(name, {}) | changed))
    if name == "bf16":  # the base's own affair: what it must be is said
        assert said != [record.message for record in caplog.records]
        assert "float32" in said[0]
        assert "bfloat16" in caplog.records[0].message
    else:
        assert outcome(after) != outcome(before)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_that_is_kept_in_step_is_a_moving_one(alpha: float) -> None:
    config = focalpo_config(dpo_config(sync_ref_model=True, ref_model_mixup_alpha=alpha, ref_model_sync_steps=64))
    assert (config.reference, config.reference_every, config.reference_mixing) == ("moving", 64, alpha)
    assert focalpo_config(dpo_config(ref_model_mixup_alpha=alpha)).reference == "disabled_adapter"


@pytest.mark.parametrize("name", OF_KIND["no_effect"])
def test_a_field_without_effect_changes_nothing(name: str) -> None:
    given = dpo_config()
    setattr(given, name, other(name, getattr(given, name)))
    assert outcome(focalpo_config(given)) == outcome(focalpo_config(dpo_config()))


@pytest.mark.row("32")
@pytest.mark.parametrize("name", [*OF_KIND["refused"], "truncation_mode"])
def test_a_refused_field_is_named_with_the_reason(name: str) -> None:
    given = dpo_config()
    setattr(given, name, other(name, getattr(given, name)))
    fate = fate_of(name)
    assert fate is not None
    with pytest.raises(InputError, match=f"(?m)^  {name}: found .*; ") as refusal:
        focalpo_config(given)
    assert fate.reason in str(refusal.value)


def test_a_field_that_starts_a_process_group_is_passed_on() -> None:
    assert translate(Given({"ddp_backend": "gloo"}, 2), {}, {}).arguments == {"ddp_backend": "gloo"}


def test_trls_defaults_are_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = focalpo_config(dpo_config())
    assert (config.learning_rate, config.beta, config.num_train_epochs) == (1e-6, 0.1, 3.0)
    assert (config.max_length, config.truncation, config.pairs_per_step) == (1024, "keep_start", 8)
    assert config.recompute == "auto"
    assert not config.allow_dropout
    assert (config.objective, config.gamma) == ("focalpo", 0.05)
    assert focalpo_config(dpo_config(), objective="dpo").objective == "dpo"
    assert focalpo_config(dpo_config(), gamma=0.1).gamma == 0.1
    monkeypatch.setattr(DPOConfig, "world_size", 3)
    given = dpo_config(per_device_train_batch_size=2, gradient_accumulation_steps=5)
    assert focalpo_config(given).pairs_per_step == 30


def test_max_steps_decides_alone() -> None:
    config = focalpo_config(dpo_config(max_steps=5, num_train_epochs=2.0))
    assert config.max_steps == 5


def test_everything_that_cannot_be_honoured_is_said_at_once() -> None:
    given = dpo_config(loss_type=["ipo"], label_smoothing=0.1, max_length=None, fp16=False, push_to_hub=True)
    given.hub_token = "hf_abcdef"
    with pytest.raises(InputError) as refusal:
        focalpo_config(given)
    lines = str(refusal.value).splitlines()[1:]
    assert {line.split(":")[0].strip() for line in lines} == {
        "loss_type", "label_smoothing", "max_length", "push_to_hub", "hub_token",
    }  # fmt: skip
    assert "hf_abcdef" not in str(refusal.value)
    with pytest.raises(InputError, match=r"expected a trl\.DPOConfig, found dict"):
        focalpo_config({})  # type: ignore[arg-type]


@dataclass
class OwnTerms(TrainingArguments):
    """What TRL's CPOConfig and OnlineDPOConfig have in common: a `loss_type`, and terms beside it."""

    loss_type: str = "sigmoid"
    cpo_alpha: float = 1.0


def test_another_trainers_config_is_refused_by_name() -> None:
    """Its own terms would vanish."""
    with pytest.raises(InputError, match=r"expected a trl\.DPOConfig, found OwnTerms.*terms that would be lost"):
        focalpo_config(OwnTerms(output_dir="out", use_cpu=True))  # type: ignore[arg-type]


@dataclass
class LaterConfig(DPOConfig):
    """A TRL that has one field more."""

    sharpness: float = 0.0


def test_a_later_trls_field_is_refused_once_it_is_set() -> None:
    assert focalpo_config(LaterConfig(output_dir="out", use_cpu=True)).beta == 0.1
    with pytest.raises(InputError, match=r"sharpness: found 1\.0; it is not classed yet"):
        focalpo_config(LaterConfig(output_dir="out", use_cpu=True, sharpness=1.0))


def test_an_earlier_trls_missing_fields_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {"trust_remote_code", "router_aux_loss_coef", "activation_checkpointing", "activation_checkpointing_kwargs"}
    monkeypatch.setattr(trl, "fields", lambda config: [s for s in dataclasses.fields(config) if s.name not in newer])
    assert focalpo_config(dpo_config()).recompute == "auto"


# ---- the oracle


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.row("64")
def test_a_translated_config_trains_as_trl_does(tmp_path: Path) -> None:
    trace, their_side = theirs(tmp_path, torch.float32)
    given = their_side.args
    given.train_sampling_strategy = "random"  # their rows were laid out in the order that our sampler draws
    args = focalpo_config(given, objective="dpo")
    args.identity_probe = False  # both sides start from an adapter that is not zero
    ours = FocalPOTrainer(
        tiny_base(), args=args, train_dataset=rows(), processing_class=word_tokenizer(), peft_config=lora()
    )
    disturb(ours.model)
    mine = trained(ours, Trace(), lambda: torch.empty(0))
    assert mine.losses == pytest.approx(trace.losses, rel=0, abs=2e-5)
    assert relative_difference(mine.weights, trace.weights) < 1e-4


# ---- the YAML of `trl dpo`

MINIMAL = """\
model_name_or_path: someone/model
dataset_name: someone/pairs
use_peft: true
lora_target_modules: [q_proj, v_proj]
"""


def hub(path: str, split: str) -> dict[str, Any]:
    return {"path": path, "revision": None, "split": split}


def written(folder: Path, more: str = "", minimal: str = MINIMAL) -> Path:
    file = folder / "dpo.yaml"
    file.write_text(minimal + more)
    return file


@pytest.mark.parametrize("name", sorted({spec.name for part in PARTS[1:] for spec in fields(part)}))
def test_each_key_of_trl_dpo_is_classed(name: str) -> None:
    assert sum(name in table for table in (_PLACES, _REFUSED, _NO_EFFECT, FATES)) == 1


def test_the_text_is_a_config_with_trls_defaults(tmp_path: Path) -> None:
    more = "learning_rate: 5e-6\neval_strategy: steps\neval_steps: 50\nper_device_train_batch_size: 4\nseed: 7\n"
    file = written(tmp_path, more + "attn_implementation: eager\noutput_dir: out/My Run\nwarmup_ratio: 0.1\n")
    text = yaml_from_trl(file, Options(processes=2))
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml")
    assert (config.name, config.model.dtype, config.adapter.r, config.adapter.alpha) == ("my-run", "bfloat16", 16, 32)
    assert (config.data.max_length, config.data.truncation, config.adapter.dropout) == (1024, "keep_start", 0)
    assert (config.objective.name, config.objective.beta) == ("focalpo", 0.1)
    assert (config.training.pairs_per_step, config.training.warmup_ratio) == (8, 0.1)
    assert (config.training.seed, config.training.data_seed) == (7, 7)
    assert config.training.activation_checkpointing == "auto"
    assert config.training.fields == {
        "learning_rate": 5e-6, "eval_strategy": "steps", "eval_steps": 50, "num_train_epochs": 3.0,
    }  # fmt: skip
    assert [(s.path, s.split) for s in config.data.sources("eval")] == [("someone/pairs", "test")]
    assert text.count("FILL IN: the commit of the data set, 40 hex digits") == 2
    assert "  learning_rate: 5.0e-06  # learning_rate\n" in text
    assert "  pairs_per_step: 8  # 4 a device, 1 accumulated, on 2 processes\n" in text
    assert "# Note: attn_implementation: no effect" in text
    assert "# Note: model.revision: not pinned" in text
    assert str(tmp_path) not in text


@pytest.mark.row("32")
@pytest.mark.parametrize(
    ("line", "section", "expected"),
    [
        ("model_name_or_path: other", "model", {"name": "other"}),
        (f"model_revision: {'a' * 40}", "model", {"revision": "a" * 40}),
        ("bf16: false", "model", {"dtype": "float32"}),
        ("lora_r: 8", "adapter", {"r": 8}),
        ("lora_alpha: 8", "adapter", {"alpha": 8}),
        ("use_dora: true", "adapter", {"use_dora": True}),
        ("use_rslora: true", "adapter", {"use_rslora": True}),
        ("lora_modules_to_save: [norm]", "adapter", {"modules_to_save": ["norm"]}),
        ("load_in_4bit: true", "model", {"quantization": "nf4"}),
        ("load_in_4bit: true\nbnb_4bit_quant_type: fp4", "model", {"quantization": "fp4"}),
        ("load_in_4bit: true\nuse_bnb_nested_quant: true", "model", {"quantization": "nf4-double"}),
        ("load_in_8bit: true", "model", {"quantization": "int8"}),
        ("lora_target_modules: all-linear", "adapter", {"targets": "all-linear"}),
        ("disable_dropout: false", "adapter", {"dropout": 0.05, "allow_dropout": True}),
        ("dataset_train_split: tenth", "data", {"train": [hub("someone/pairs", "tenth")]}),
        ("datasets: [{path: a/b}]", "data", {"train": [hub("a/b", "train")]}),
        ("eval_strategy: epoch\ntest_split_size: 0.1", "data", {"held_out": 0.1}),
        ("max_length: 99", "data", {"max_length": 99}),
        ("beta: 0.01", "objective", {"beta": 0.01}),
        ("gradient_accumulation_steps: 4", "training", {"pairs_per_step": 32}),
        ("max_steps: 5", "training", {"max_steps": 5}),
        ("warmup_steps: 20", "training", {"warmup_steps": 20}),
        ("data_seed: 5", "training", {"data_seed": 5}),
        ("learning_rate: 1.0e-4", "training", {"learning_rate": 1e-4}),
    ],
)  # fmt: skip
def test_a_key_arrives_at_its_place(tmp_path: Path, line: str, section: str, expected: dict[str, Any]) -> None:
    minimal = "\n".join(one for one in MINIMAL.splitlines() if one.split(":")[0] not in line)
    before, _ = config_from_trl(written(tmp_path))
    after, _ = config_from_trl(written(tmp_path, f"\n{line}\n", minimal))
    assert {key: after[section][key] for key in expected} == expected
    assert {key: before[section].get(key) for key in expected} != expected


@pytest.mark.row("32")
@pytest.mark.parametrize("held", ["", "load_in_8bit: true\n"])
def test_details_of_4_bits_without_4_bits_are_told(tmp_path: Path, held: str) -> None:
    config, notes = config_from_trl(written(tmp_path, f"{held}bnb_4bit_quant_type: fp4\nuse_bnb_nested_quant: true\n"))
    assert config["model"].get("quantization") == ("int8" if held else None)
    for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
        assert f"{key}: no effect, in TRL neither, without load_in_4bit: true" in notes


def test_checkpointing_switched_off(tmp_path: Path) -> None:
    config, _ = config_from_trl(written(tmp_path, "gradient_checkpointing: false\nmax_steps: 3\n"))
    assert config["training"]["activation_checkpointing"] == "none"
    assert "num_train_epochs" not in config["training"]


def test_without_bf16_the_stated_dtype_holds(tmp_path: Path) -> None:
    config, _ = config_from_trl(written(tmp_path, "bf16: false\ndtype: bfloat16\n"))
    assert config["model"]["dtype"] == "bfloat16"


def test_without_peft_every_parameter_is_trained(tmp_path: Path) -> None:
    minimal = "model_name_or_path: a/b\ndataset_name: a/pairs\nlora_r: 8\n"
    config, notes = config_from_trl(written(tmp_path, minimal=minimal), Options())
    assert "adapter" not in config
    assert (config["reference"], config["model"]["dtype"]) == ({"kind": "cached"}, "bfloat16")
    assert "lora_r: no effect, in TRL neither, without use_peft: true" in notes
    assert any("cache-reference" in note for note in notes)
    assert not any(note.startswith("model.dtype") for note in notes)
    (tmp_path / "run.yaml").write_text(yaml_from_trl(tmp_path / "dpo.yaml", Options()))
    with pytest.raises(InputError, match="adapter"):
        config_from_trl(written(tmp_path, "load_in_4bit: true\n", minimal))


def test_files_take_the_place_of_data_sets(tmp_path: Path) -> None:
    file = written(tmp_path, "eval_strategy: steps\n")
    config, notes = config_from_trl(file, Options("dpo", data="pairs.jsonl", eval_data="held.jsonl"))
    assert (config["data"]["train"], config["data"]["eval"]) == ("pairs.jsonl", "held.jsonl")
    assert config["objective"] == {"name": "dpo", "beta": 0.1}
    assert not any("FILL" in note or "hub" in note for note in notes)
    with pytest.raises(InputError, match="eval_strategy: asks for held-out pairs; give a file"):
        config_from_trl(file, Options(data="pairs.jsonl"))


def test_all_that_cannot_be_translated_is_said_at_once(tmp_path: Path) -> None:
    refused = {
        "load_in_8bit": "2", "loss_type": "ipo", "beta": "high", "fsdp": "full_shard",
        "lora_target_parameters": "[a]",
        "max_length": "null", "rpo_alpha": "1.0", "dataset_config": "x", "model_revision": "dev", "env": "{A: b}",
        "learning_rat": "3", "save_strategy": "best",
    }  # fmt: skip
    minimal = "model_name_or_path: a/b\nuse_peft: false\n"
    file = written(tmp_path, "".join(f"{key}: {value}\n" for key, value in refused.items()), minimal)
    with pytest.raises(InputError) as refusal:
        config_from_trl(file)
    named = [line.split(":")[0].strip() for line in str(refusal.value).splitlines()[1:]]
    assert sorted(named) == sorted([*refused, "dataset_name"])
    assert "did you mean learning_rate?" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "found list; a file of `trl dpo` is a mapping"),
        (MINIMAL.replace("lora_target", "#lora_target"), "lora_target_modules: missing; TRL leaves it to PEFT"),
        (MINIMAL + "dtype: float16", "dtype: found 'float16', which overflows"),
        (MINIMAL + "bf16: false\ndtype: auto", "with bf16 off; say bfloat16 or float32"),
        (MINIMAL + "datasets: [{path: a/b, fraction: 0.5}]", r"datasets\[0\]: fraction cannot be translated"),
        (MINIMAL + "per_device_train_batch_size: 0", "must be whole numbers above 0"),
        (MINIMAL + "load_in_4bit: true\nload_in_8bit: true", "load_in_8bit: load_in_4bit is set too"),
    ],
)
def test_a_file_that_cannot_be_translated_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        yaml_from_trl(written(tmp_path, minimal=text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.yaml"):
        yaml_from_trl(tmp_path / "none.yaml")


def test_the_base_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        focalpo_config(dpo_config())
    assert "load the base in float32" in caplog.text


@pytest.mark.slow
def test_a_translated_file_trains(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    minimal = MINIMAL.replace("someone/model", str(inputs / "base"))
    more = "bf16: false\nlearning_rate: 1e-2\nmax_steps: 3\nlogging_steps: 1\nsave_strategy: 'no'\nuse_cpu: true\n"
    options = Options(data=str(inputs / "train.jsonl"), eval_data=str(inputs / "eval.jsonl"))
    (tmp_path / "run.yaml").write_text(yaml_from_trl(written(tmp_path, more, minimal), options))
    summary = train(load_config(tmp_path / "run.yaml"), runs_dir=tmp_path / "runs", quiet=True)
    assert summary.steps == 3
    assert metric_lines(summary.folder)[-1]["rewards/margins"] > 0
