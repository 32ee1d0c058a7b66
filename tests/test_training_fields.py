"""Every field of TrainingArguments is classed, and the classes mean what they say."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from lorafocal import training_fields
from lorafocal.errors import InputError
from lorafocal.training_fields import (
    RULES,
    SCHEDULES,
    accepts,
    check_training_fields,
    classify,
    fields_in_source,
    forced_values,
    installed_fields,
)

ONLY_IN_OLDER_VERSIONS = {"warmup_ratio", "logging_dir"}  # transformers 5.5
ADDED_BETWEEN_5_5_AND_5_23 = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
    "dataloader_multiprocessing_context", "ddp_static_graph", "trackio_bucket_id", "trackio_static_space_id",
}  # fmt: skip


def test_every_installed_field_is_classed_and_no_rule_is_made_up() -> None:
    assert set(installed_fields()) - set(RULES) == set()
    newest = Version(version("transformers")) >= Version("5.23")
    absent = ONLY_IN_OLDER_VERSIONS | (set() if newest else ADDED_BETWEEN_5_5_AND_5_23)
    assert set(RULES) - set(installed_fields()) <= absent


def test_reading_the_fields_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lorafocal.training_fields import installed_fields as fields;"
        "assert len(fields()) > 100;"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """The real defaults of TrainingArguments; a factory is called."""
    from transformers import TrainingArguments

    missing = dataclasses.MISSING
    return {
        field.name: field.default if field.default is not missing else field.default_factory()
        for field in dataclasses.fields(TrainingArguments)
        if field.default is not missing or field.default_factory is not missing
    }


def test_the_source_shows_the_fields_that_the_class_has(defaults: dict[str, Any]) -> None:
    assert set(installed_fields()) == set(defaults)


def test_a_default_is_never_refused(defaults: dict[str, Any]) -> None:
    """The Python door sees only values that differ from a default: a default must mean "not asked for"."""
    for name, rule in RULES.items():
        if rule.kind == "refused" and name in defaults:
            assert defaults[name] == rule.value, name


def test_transformers_takes_what_we_set(defaults: dict[str, Any], tmp_path: Any) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **forced_values())
    for name, value in forced_values().items():
        assert getattr(arguments, name) == value, name


@pytest.mark.row("F6")
def test_the_filter_that_hides_nan_is_off() -> None:
    assert forced_values()["logging_nan_inf_filter"] is False
    assert forced_values()["ddp_find_unused_parameters"] is False
    [problem] = check_training_fields({"logging_nan_inf_filter": True})
    assert "NaN" in problem


@pytest.mark.row("12")
def test_half_precision_is_refused_with_the_reason() -> None:
    [problem] = check_training_fields({"fp16": True})
    assert "overflows" in problem
    assert "bfloat16" in problem


@pytest.mark.row("15")
@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "per_device_train_batch_size"])
def test_the_step_has_one_knob(name: str) -> None:
    [problem] = check_training_fields({name: 4})
    assert "pairs_per_step" in problem
    assert check_training_fields({name: 1}) == []


@pytest.mark.row("32")
@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.kind != "supported"))
def test_what_would_be_ignored_is_refused_with_a_reason(name: str) -> None:
    [problem] = check_training_fields({name: "something else"})
    assert problem.startswith(f"{name}: ")
    assert RULES[name].reason in problem
    assert check_training_fields({name: RULES[name].value}) == []


def test_a_field_of_a_later_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {**installed_fields(), "quantum_steps": "int"}
    monkeypatch.setattr(training_fields, "installed_fields", lambda: later)
    assert classify("quantum_steps").kind == "refused"
    [problem] = check_training_fields({"quantum_steps": 3})
    assert "not classed yet" in problem


def test_a_field_that_an_older_transformers_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {name: kind for name, kind in installed_fields().items() if name != "activation_checkpointing"}
    monkeypatch.setattr(training_fields, "installed_fields", lambda: older)
    [problem] = check_training_fields({"activation_checkpointing": True})
    assert "does not have this field" in problem


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'learning_rate'"):
        classify("lerning_rate")
    [problem] = check_training_fields({"lerning_rate": 1e-5})
    assert "did you mean 'learning_rate'" in problem


@pytest.mark.row("F18")
def test_numbers_as_text_are_refused() -> None:
    [problem] = check_training_fields({"learning_rate": "5e-6"})
    assert "found '5e-6' (str); it must be of type float" in problem


@pytest.mark.parametrize(
    ("annotation", "yes", "no"),
    [
        ("float", [1, 0.5], ["1", True, None, float("nan")]),
        ("int", [1], [1.0, True, "1"]),
        ("bool | None", [True, None], [1, "true"]),
        ("SchedulerType | str", ["linear"], [1, None]),
        ("dict[str, Any] | str | None", [{"a": 1}, "x", None], [1, [1]]),
        ("None | str | list[str]", ["a", ["a"], None], [[1], 1]),
        ("list[float] | None", [[1, 0.5], None], [["1"], [True], 1]),
        ("str | None | Literal[False]", [False, "a"], [True, 0]),
        ("float | None", [None, 2], ["x"]),
    ],
)
def test_values_are_checked_against_annotations(annotation: str, yes: list[Any], no: list[Any]) -> None:
    assert all(accepts(annotation, value) for value in yes)
    assert not any(accepts(annotation, value) for value in no)


def test_enum_members_and_their_values_are_one() -> None:
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    assert (
        check_training_fields({"lr_scheduler_type": SchedulerType.COSINE, "eval_strategy": IntervalStrategy.EPOCH})
        == []
    )
    [problem] = check_training_fields({"lr_scheduler_type": SchedulerType.REDUCE_ON_PLATEAU})
    assert "reduce_lr_on_plateau" in problem


def test_choices_exist_in_transformers() -> None:
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    for name, kind in [
        ("optim", OptimizerNames),
        ("lr_scheduler_type", SchedulerType),
        ("eval_strategy", IntervalStrategy),
    ]:
        assert set(RULES[name].choices) <= {member.value for member in kind}


@pytest.mark.row("32")
@pytest.mark.parametrize(
    "given",
    [
        {"eval_steps": 10},
        {"eval_steps": 10, "eval_strategy": "epoch"},
        {"save_steps": 10, "save_strategy": "no"},
        {"logging_steps": 10, "logging_strategy": "epoch"},
        {"max_steps": 10, "num_train_epochs": 2},
        {"warmup_steps": 10, "lr_scheduler_type": "constant"},
        {"adam_beta1": 0.95, "optim": "sgd"},
        {"eval_delay": 2, "eval_strategy": "no"},
        {"eval_delay": 2},
        {"dataloader_persistent_workers": True},
        {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 0},
        {"lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"lr_scheduler_kwargs": {"min_lr": 1e-7, "power": 2}, "lr_scheduler_type": "cosine_with_min_lr"},
    ],
)
def test_fields_that_another_makes_meaningless_are_refused(given: dict[str, Any]) -> None:
    [problem] = check_training_fields(given)
    assert "remove" in problem


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_train_epochs": 0}, "above 0"),
        ({"max_steps": 0}, "above 0"),
        ({"max_steps": 10**21}, "below 1000000000000"),
        ({"learning_rate": -1e-6}, "at least 0"),
        ({"seed": -1}, "at least 0 and below 4294967296"),
        ({"data_seed": 2**32}, "at least 0 and below 4294967296"),
        ({"dataloader_num_workers": -1}, "at least 0"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "at least 1"),
        ({"eval_strategy": "epoch", "eval_delay": -1}, "at least 0"),
        ({"save_steps": 0}, "above 0"),
        ({"save_total_limit": 0}, "at least 1"),
        ({"ddp_timeout": 0}, "at least 1"),
    ],
)
def test_numbers_that_would_fail_later_or_train_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    [problem] = check_training_fields(given)
    assert words in problem


@pytest.mark.newest
def test_schedules_take_what_the_table_says() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for schedule, keys in SCHEDULES.items():
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]
        assert {*inspect.signature(function).parameters} - own == {*keys}, schedule


@pytest.mark.parametrize("schedule", ["cosine_with_min_lr", "warmup_stable_decay"])
def test_a_schedule_that_would_fail_without_its_settings_is_refused(schedule: str) -> None:
    [problem] = check_training_fields({"lr_scheduler_type": schedule})
    assert f"{schedule} needs" in problem


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('{"num_cycles": 0.5}', "needs min_lr or min_lr_rate"),
        ('{"min_lr": 1e-7, "power": 2}', "remove power"),
        ('{"min_lr": ', "is no mapping"),
        ("min_lr=1e-7", "is no mapping"),
        ({"min_lr": 1e-7, "min_lr_rate": 0.1}, "not both"),
        ({"min_lr": None}, "needs min_lr or min_lr_rate"),
    ],
)
def test_settings_of_a_schedule_are_looked_at_as_text_too(settings: Any, words: str) -> None:
    [problem] = check_training_fields({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": settings})
    assert words in problem


def test_settings_of_a_schedule_may_be_json() -> None:
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}'}
    assert not check_training_fields(given)


def test_fields_that_go_together_pass() -> None:
    assert check_training_fields({"eval_steps": 10, "eval_strategy": "steps", "save_steps": 5, "max_steps": 20}) == []


def test_a_secret_is_not_repeated() -> None:
    [problem] = check_training_fields({"hub_token": "hf_canary"})
    assert "hf_canary" not in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("include_num_input_tokens_seen", False), ("debug", None), ("debug", []), ("hub_token", "<HUB_TOKEN>")],
)
def test_what_a_parser_or_a_copy_writes_for_nothing_passes(name: str, value: Any) -> None:
    assert check_training_fields({name: value}) == []
    assert check_training_fields({name: "something"}) != []


def test_another_training_args_file_is_named() -> None:
    with pytest.raises(InputError, match="no class TrainingArguments"):
        fields_in_source("class Other: pass")


@pytest.mark.row("32", "62")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_optimisers_of_bitsandbytes_name_the_extra_where_it_is_missing(optim: str, monkeypatch) -> None:
    assert check_training_fields({"optim": optim}) == []
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    [problem] = check_training_fields({"optim": optim})
    assert "pip install 'lorafocal[quant]'" in problem
    assert check_training_fields({"optim": "adamw_torch"}) == []


@pytest.mark.row("48")
@pytest.mark.parametrize(("field", "engine"), [("fsdp", "fsdp2"), ("deepspeed", "zero3")])
def test_engines_have_a_word_of_their_own(field: str, engine: str) -> None:
    [problem] = check_training_fields({field: "full_shard"})
    assert f"engine.kind: {engine}" in problem
