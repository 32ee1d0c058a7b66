"""The schema is closed, every key has an effect, and all mistakes are told at once."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafocal.config import (
    Config,
    check_config,
    known_keys,
    load_config,
    lora_arguments,
    resolved_yaml,
    training_arguments,
)
from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, PARAMETERS, python_name
from lorafocal.schema import Evaluation
from lorafocal.training_fields import RULES, installed_fields
from lorafocal.yaml12 import dump_yaml
from tests.config_values import OTHER_VALUES, REFERENCE_OF, STEP_OF

VALUES: dict[str, Any] = {
    "name": "run",
    "model": {"name": "base", "dtype": "float32"},
    "adapter": {"r": 8, "alpha": 16},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "objective": {"name": "focalpo", "beta": 0.1},
    "reference": {"kind": "disabled_adapter"},
    "training": {"pairs_per_step": 64, "learning_rate": 1e-4, "eval_strategy": "steps"},
}
# Keys that speak to somebody else than the trainer or LoRA: which model is loaded, which files are read.
SOURCE_KEYS = ("path", "weight", "form", "columns", "revision", "split")
READ_BY_THE_RUN = {
    "recipe", "model.name", "model.dtype", "model.revision", "model.shape", "model.quantization", "model.backend",
    "adapter.trainable_tokens", "data.train", "data.eval", "data.leave_out",
    "data.held_out", "data.form", "data.columns", "data.revision", "data.split", "data.on_bad_row", "data.cache",
    *(f"data.{name}.{key}" for name in ("train", "eval") for key in SOURCE_KEYS),
    *(f"evaluation.{key}" for key in Evaluation.model_fields),
    *(key for key in known_keys() if key.startswith("data.steps.") and ".order." not in key), "stages",
}  # fmt: skip
FOCALPO_FIELDS = {
    "objective", *map(python_name, PARAMETERS), "pairs_per_step", "max_length", "max_prompt_length", "truncation",
    "chat_template_kwargs", "keep_order", "layout", "tokens_per_pack", "identity_probe", "allow_dropout", "reference",
    "loraplus_lr_ratio", "recompute", "adapter_kernels", "elementwise_kernels", "compile_layers", "reference_store",
}  # fmt: skip
ANOTHER_SOURCE = {
    "path": "another.jsonl", "weight": 0.5, "form": "sharegpt", "columns": {"prompt": "question"},
    "revision": "0123456789abcdef0123456789abcdef01234567", "split": "test",
}  # fmt: skip
# Keys that need a second key beside them.
HELD_OUT = "data={train: train.jsonl, held_out: 0.1}"
GUIDED = {"name": "modpo", "beta": 0.1}
TOGETHER = {
    "training.lr_scheduler_kwargs": [
        "training.lr_scheduler_type=polynomial",
        "training.lr_scheduler_kwargs={power: 2.0}",
    ],
    **{
        f"training.dataloader_{name}": ["training.dataloader_num_workers=1", f"training.dataloader_{name}={value}"]
        for name, value in {"persistent_workers": "true", "prefetch_factor": 7}.items()
    },
    "adapter.dropout": ["adapter.dropout=0.1", "adapter.allow_dropout=true"],
    "adapter.start_from": ["adapter={start_from: runs/sft/adapter}", "reference.identity_probe=false"],
    "model.backend": ["model.backend=unsloth", "model.dtype=bfloat16"],
    "objective.name": ["objective.name=dpo"],
    "objective.focal.form": ["objective={name: dpo, beta: 0.1, focal: {form: hard, gamma: 0.5}}"],
    "objective.focal.gamma": ["objective={name: dpo, beta: 0.1, focal: {gamma: 0.5}}"],
    "objective.guard": ["objective.guard=clip"],
    "data.held_out": [HELD_OUT],
    "stages": ["stages=3"],
    "data.truncation": ["data.truncation=keep_start"],
    "data.max_prompt_length": ["data.truncation=recipe", "data.max_prompt_length=512"],
    "engine.kind": ["engine.kind=fsdp2"],
    "engine.offload": ["engine={kind: fsdp2, offload: all}"],
    "reference.kind": ["reference.kind=frozen_copy"],
    "reference.store": ["reference={kind: cached, store: elsewhere}"],
    "reference.model": ["reference={kind: separate_model, model: another}"],
    "reference.revision": [
        "reference={kind: separate_model, model: another, revision: 0123456789abcdef0123456789abcdef01234567}"
    ],
    "reference.guide": [f"objective={json.dumps(GUIDED)}", "reference.guide=runs/guide/adapter"],
}
TOGETHER |= {f"reference.{key}": [f"reference={value}"] for key, value in REFERENCE_OF.items()}
TOGETHER |= {f"data.steps.{key}": [f"data.steps=[{step}]"] for key, step in STEP_OF.items()}
for key, value in {"every": 7, "count": 7, "max_new_tokens": 7, "temperature": 0.5}.items():
    TOGETHER[f"evaluation.{key}"] = [f"evaluation={json.dumps({'every': 9, 'rule': 'exact', key: value})}", HELD_OUT]
for key, section in {
    "rule": {"rule": "number"}, "pattern": {"rule": "regex", "pattern": "x"}, "reward_model": {"reward_model": "judge"}
}.items():  # fmt: skip
    TOGETHER[f"evaluation.{key}"] = [f"evaluation={json.dumps({'every': 9, **section})}", HELD_OUT]
for name, entry in OBJECTIVES.items():
    stated = {key: of.default for key, of in entry.parameters.items() if of.stated}
    for key in entry.parameters.keys() - {"beta", "gamma"}:
        chosen = [f"objective={json.dumps({'name': name, **stated, key: 0.3})}"]
        if entry.guide:
            chosen.append("reference.guide=runs/guide/adapter")
        TOGETHER[f"objective.{key}"] = chosen if entry.reference else [*chosen, "reference=null"]
for name, key in itertools.product(("train", "eval"), SOURCE_KEYS):
    source = {"path": f"{name}.jsonl"} | {key: ANOTHER_SOURCE[key]}
    TOGETHER[f"data.{name}.{key}"] = [f"data.{name}={json.dumps(source)}"]
CHOICES = (
    "data.truncation",
    "data.on_bad_row",
    "reference.kind",
    "objective.name",
    "objective.focal.form",
    "objective.guard",
    "packing.layout",
    "packing.tokens",
    "kernels.adapters",
    "kernels.elementwise",
    "training.activation_checkpointing",
    "model.quantization",
    "model.backend",
    "adapter.init",
    "engine.kind",
    "engine.offload",
    "evaluation.rule",
)


def changed(*path_and_value: Any) -> dict[str, Any]:
    """VALUES with one entry replaced: changed("model", "dtype", "float16")."""
    *path, last, value = path_and_value
    values = copy.deepcopy(VALUES)
    place = values
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    return values


def mistakes(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        check_config(values)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(VALUES))
    return path


def everything(config: Config) -> dict[str, Any]:
    return {**training_arguments(config), **(lora_arguments(config.adapter) if config.adapter else {})}


def override_for(key: str) -> list[str]:
    if key in TOGETHER:
        return TOGETHER[key]
    if key in OTHER_VALUES:
        return [f"{key}={OTHER_VALUES[key]}"]
    name = key.removeprefix("training.")
    choices, annotation = RULES[name].choices, installed_fields()[name]
    samples = {"bool": "true", "int": "7", "float": "0.25", "str": "word"}
    value = choices[-1] if choices else next(v for kind, v in samples.items() if kind in annotation)
    return [f"{key}={value}"]


@pytest.mark.row("32")
@pytest.mark.parametrize("key", sorted(known_keys()))
def test_every_key_changes_the_run(key: str, file: Path) -> None:
    before, after = load_config(file), load_config(file, override_for(key))
    assert before.sha() != after.sha()
    assert resolved_yaml(before) != resolved_yaml(after)
    assert (everything(before) == everything(after)) == (key in READ_BY_THE_RUN)


@pytest.mark.parametrize("key", [*REFERENCE_OF, "guide"])
def test_a_key_of_a_reference_reaches_the_trainer(key: str, file: Path) -> None:
    """By itself: the kind that it belongs to is an effect of its own."""
    config = load_config(file, TOGETHER[f"reference.{key}"])
    said = getattr(config.reference, key)
    assert said is not None
    assert training_arguments(config)[f"reference_{key}"] == said


@pytest.mark.row("32")
@pytest.mark.parametrize("key", CHOICES)
def test_a_key_with_choices_refuses_others(key: str, file: Path) -> None:
    said = "'another' is not known; did you mean " if key == "objective.name" else "found 'another'"
    with pytest.raises(InputError, match=f"{key}: {said}"):
        load_config(file, [f"{key}=another"])


@pytest.mark.row("32")
def test_the_trainer_has_a_field_for_every_argument(file: Path) -> None:
    overrides = ["training.warmup_ratio=0.1", "training.activation_checkpointing=true"]
    assert set(training_arguments(load_config(file, overrides))) - FOCALPO_FIELDS <= set(installed_fields())


def test_defaults_are_written_down(file: Path) -> None:
    text = resolved_yaml(load_config(file))
    for line in (
        "gamma: 0.05",
        "max_length: 1024",
        "truncation: drop",
        "tokens: auto",
        "data_seed: 42",
        "dropout: 0.0",
    ):
        assert line in text


def test_a_resolved_config_is_the_same_config(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["training.learning_rate=5e-6", "name=no", "objective.name=dpo"])
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config
    assert load_config(again).sha() == config.sha()


def test_reading_a_config_imports_neither_torch_nor_transformers(file: Path) -> None:
    code = (
        "import sys; from lorafocal.config import *; c = load_config(sys.argv[1]);"
        "training_arguments(c); resolved_yaml(c);"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_mistakes_are_told_at_once() -> None:
    text = mistakes(
        {
            "name": "Not A Name",
            "model": {"name": "base", "dtype": "float16", "revision": "main"},
            "adapter": {"r": 0, "alpha": "16", "targets": []},
            "data": {"max_lenth": 3},
            "objective": {"name": "focalpo"},
            "reference": {},
            "training": {"learning_rate": "5e-6", "lerning_rate": 1e-5, "fp16": True, "warmup_ratio": 1.0},
            "packing": None,
        }
    )
    told = """name model.dtype model.revision adapter.r adapter.alpha adapter.targets data.max_lenth
        data.train objective.beta reference.kind training.learning_rate training.lerning_rate training.fp16
        training.warmup_ratio training.pairs_per_step packing"""
    for key in told.split():
        assert f"\n  {key}: " in text, key
    assert "16 mistakes" in text
    assert "name: found 'Not A Name'; allowed: at most 64 lower-case letters" in text
    assert "model.revision: found 'main'; allowed: the 40 hex digits of a commit" in text


@pytest.mark.row("32")
@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("data", "max_lenght"), "data.max_length"),
        (("trainig",), "training"),
        (("objective", "learning_rate"), "training.learning_rate"),
        (("training", "beta"), "objective.beta"),
        (("training", "lora_alpha"), None),
        (("training", "_target_"), None),
        (("_target_",), None),
        (("use_dora",), "adapter.use_dora"),
        (("training", "loraplus_ratio"), "training.loraplus_lr_ratio"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(path: tuple[str, ...], nearest: str | None) -> None:
    text = mistakes(changed(*path, 1))
    assert f"{'.'.join(path)}: unknown key" in text
    assert (nearest is None) or f"did you mean {nearest}" in text


@pytest.mark.row("F18", "32")
def test_a_learning_rate_without_a_point_is_a_number(file: Path) -> None:
    file.write_text(dump_yaml(VALUES).replace("0.0001", "5e-6").replace("1.0e-04", "5e-6"))
    assert training_arguments(load_config(file))["learning_rate"] == 5e-6
    assert training_arguments(load_config(file, ["training.learning_rate=1e-5"]))["learning_rate"] == 1e-5
    with pytest.raises(InputError, match=r"training\.learning_rate: found '1e-5'"):
        load_config(file, ["training.learning_rate='1e-5'"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("objective", "beta"), "0.1"),
        (("objective", "beta"), True),
        (("adapter", "r"), 8.5),
        (("training", "pairs_per_step"), "64"),
        (("reference", "identity_probe"), "yes"),
        (("training", "max_steps"), 1.5),
        (("objective", "beta"), float("nan")),
        (("training", "learning_rate"), float("inf")),
    ],
)
def test_types_are_strict(path: tuple[str, ...], value: Any) -> None:
    assert ".".join(path) in mistakes(changed(*path, value))


@pytest.mark.row("12")
@pytest.mark.parametrize("dtype", ["float16", "fp16", "half"])
def test_half_precision_is_refused_with_the_reason(dtype: str) -> None:
    assert "half precision overflows" in mistakes(changed("model", "dtype", dtype))
    assert "half precision overflows" in mistakes(changed("training", "fp16", True))


def test_precision_is_said_once() -> None:
    assert "the base's dtype decides" in mistakes(changed("training", "bf16", True))


@pytest.mark.row("14")
def test_dropout_needs_permission() -> None:
    assert "adapter: dropout is 0.05" in mistakes(changed("adapter", "dropout", 0.05))
    allowed = check_config(changed("adapter", {"r": 8, "alpha": 16, "dropout": 0.05, "allow_dropout": True}))
    assert training_arguments(allowed)["allow_dropout"] is True
    assert lora_arguments(allowed.adapter)["lora_dropout"] == 0.05


@pytest.mark.row("1")
def test_the_reference_has_no_default() -> None:
    assert "reference.kind: missing" in mistakes(changed("reference", {}))
    assert "reference.kind: found 'frozen'" in mistakes(changed("reference", "kind", "frozen"))


@pytest.mark.row("F19")
def test_warmup_is_translated_to_the_installed_transformers(file: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    given = training_arguments(load_config(file, ["training.warmup_ratio=0.1", "training.use_cpu=true"]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), **{key: value for key, value in given.items() if key not in FOCALPO_FIELDS}
    )
    assert arguments.get_warmup_steps(200) == 20


@pytest.mark.parametrize(
    ("word", "tier"), [("true", "full"), ("false", "none"), ("mlp", "mlp"), ("auto", "auto"), ("full", "full")]
)
def test_what_is_recomputed_is_a_tier_or_yes_or_no(word: str, tier: str, file: Path) -> None:
    config = load_config(file, [f"training.activation_checkpointing={word}"])
    assert training_arguments(config)["recompute"] == tier


def test_stored_log_probs_are_of_the_start_or_of_a_model(file: Path) -> None:
    start = training_arguments(load_config(file, ["reference={kind: cached}"]))
    assert start["reference_store"] == "references"
    assert "identity_probe" not in start
    other = training_arguments(load_config(file, ["reference={kind: cached, model: another, store: there}"]))
    assert (other["reference_store"], other["identity_probe"]) == ("there", False)
    text = mistakes(changed("reference", {"kind": "frozen_copy", "store": "there"}))
    assert "reference.store: only kind: cached keeps log-probs; frozen_copy would ignore it" in text


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("gradient_checkpointing", "training.activation_checkpointing"),
        ("run_name", "name"),
        ("output_dir", "name"),
        ("activation_checkpointing_kwargs", "training.activation_checkpointing"),
    ],
)
def test_fields_with_a_key_of_ours_point_to_it(key: str, instead: str) -> None:
    assert f"said by the key {instead}" in mistakes(changed("training", key, True))


def test_warmup_is_said_once() -> None:
    both = changed("training", {"pairs_per_step": 64, "warmup_ratio": 0.1, "warmup_steps": 10})
    assert "remove one of the two" in mistakes(both)


def test_evaluation_needs_data() -> None:
    values = changed("data", {"train": "train.jsonl"})
    assert "neither data.eval nor data.held_out" in mistakes(values)
    check_config(values | {"training": {"pairs_per_step": 64}})


@pytest.mark.row("57")
def test_seeds_are_separate_and_written_down(file: Path) -> None:
    given = training_arguments(load_config(file, ["training.data_seed=7"]))
    assert (given["seed"], given["data_seed"]) == (42, 7)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a" * 65, "a b"])
def test_a_run_name_is_a_plain_folder_name(name: str) -> None:
    assert "name: found" in mistakes(changed("name", name))


def test_overrides_apply_in_order_and_make_sections(file: Path) -> None:
    given = ["packing.tokens=10", "packing.tokens=20", "model.shape={model_type: llama}", "adapter.r=2"]
    config = load_config(file, given)
    assert config.packing.tokens == 20
    assert config.model.shape == {"model_type": "llama"}
    assert load_config(file, ["model.shape.model_type=llama"]).model.shape == {"model_type": "llama"}


@pytest.mark.parametrize("override", ["adapter.r", "=1", "adapter..r=1", "name.x=1", "adapter.r=[1", ".r=2"])
def test_a_broken_override_is_named(override: str, file: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.r|override|no keys inside"):
        load_config(file, [override])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the config .*missing\.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot read the config"):
        load_config(tmp_path)
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1")
    with pytest.raises(InputError, match="found list; a config is a mapping"):
        load_config(listed)


def test_a_shape_names_its_architecture() -> None:
    assert "model_type among them" in mistakes(changed("model", "shape", {"hidden_size": 3}))


def test_a_config_cannot_be_changed(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


def test_a_mistake_in_an_override_is_told_with_the_override(file: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml with adapter\.r=x: 1 mistake\n  adapter\.r: found 'x'"):
        load_config(file, ["adapter.r=x"])
