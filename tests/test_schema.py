"""What the schema refuses although every key alone would be right, and what its sections fill in."""

from __future__ import annotations

from typing import Any

import pytest

from lorafocal.config import check_config, training_arguments
from tests.test_config import VALUES, changed, mistakes


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("data", {"train": "a.jsonl", "eval": "b.jsonl", "held_out": 9}, "data.held_out: data.eval names held-out"),
        ("data", {"train": "a.jsonl", "held_out": 1.5}, "data.held_out: found 1.5; allowed: a number of pairs"),
        ("data", {"train": "x" * 300}, "data.train.0.path: found 'xxx"),
        ("model", {"name": "a\0b", "dtype": "float32"}, "model.name: found 'a\\x00b'; allowed: a hub id or path"),
        ("data", {"train": [], "eval": "b.jsonl"}, "data.train: found an empty list"),
        ("data", {"train": [{"path": "a", "wieght": 2}]}, "data.train.0.wieght: unknown key; did you mean data.train"),
        ("data", {"train": "a.jsonl", "truncation": "recipe"}, "data.max_prompt_length: missing"),
        ("data", {"train": "a.jsonl", "max_prompt_length": 9}, "data.max_prompt_length: only truncation: recipe"),
        ("adapter", {"start_from": "runs/sft/adapter", "r": 8}, "adapter.start_from: the adapter brings its own r"),
        ("adapter", {"alpha": 8}, "adapter.r: missing"),
        ("objective", {"name": "sft", "beta": 0.1}, "objective.beta: sft has none"),
        ("objective", {"name": "dpo"}, "objective.beta: missing"),
        ("reference", {"kind": "separate_model"}, "reference.model: missing"),
        ("reference", {"kind": "frozen_copy", "model": "m"}, "reference.model: only kind: separate_model"),
        ("reference", None, "reference: missing"),
        (
            "training",
            {"pairs_per_step": 4, "learning_rate": -1},
            "training.learning_rate: found -1; it must be at least",
        ),
        ("training", {"pairs_per_step": 4, "weight_decay": float("nan")}, "training.weight_decay: found nan; it must"),
        (
            "training",
            {"pairs_per_step": 4, "adam_beta2": 1.0},
            "training.adam_beta2: found 1.0; it must be at least 0 and",
        ),
    ],
)
def test_what_does_not_fit_together_is_told_at_its_key(section: str, value: Any, told: str) -> None:
    assert told in mistakes({**VALUES, section: value})


def test_gate_and_up_are_computed_again_by_the_fused_functions_alone() -> None:
    training = {**VALUES["training"], "activation_checkpointing": "mlp"}
    values = {**VALUES, "data": {"train": "a.jsonl", "held_out": 9}, "training": training}
    told = mistakes({**values, "kernels": {"adapters": "peft"}})
    assert "training.activation_checkpointing: mlp computes gate and up again, which PEFT's own" in told
    assert check_config(values).training.activation_checkpointing == "mlp"


def test_a_backend_takes_what_it_computes_right() -> None:
    values = {**VALUES, "model": {"name": "base", "dtype": "bfloat16", "backend": "unsloth"}}
    assert check_config(values).model.backend == "unsloth"
    for model in ({"dtype": "float32"}, {"quantization": "int8"}):
        told = mistakes({**values, "model": values["model"] | model})
        assert "model.backend: unsloth computes in bfloat16" in told
    assert "packing.layout: unsloth's attention takes no packs" in mistakes({**values, "packing": {"layout": "packed"}})


def test_a_continued_adapter_does_not_start_at_the_base() -> None:
    values = {**VALUES, "adapter": {"start_from": "runs/sft/adapter"}}
    assert "reference.kind: disabled_adapter is the base without the adapter" in mistakes(values)
    for reference in ({"kind": "frozen_copy"}, {"kind": "disabled_adapter", "identity_probe": False}):
        assert check_config({**values, "reference": reference}).adapter.start_from == "runs/sft/adapter"


@pytest.mark.row("64")
def test_gamma_belongs_to_focalpo() -> None:
    assert training_arguments(check_config(VALUES))["gamma"] == 0.05
    dpo = check_config(changed("objective", {"name": "dpo", "beta": 0.1}))
    assert "gamma" not in training_arguments(dpo)
    assert "would ignore it" in mistakes(changed("objective", {"name": "dpo", "beta": 0.1, "gamma": 0.05}))
    assert "gamma is None" in mistakes(changed("objective", {"name": "focalpo", "beta": 0.1, "gamma": None}))
    assert "learns backwards" in mistakes(changed("objective", "gamma", 1.5))
    assert "beta is 0.0" in mistakes(changed("objective", "beta", 0))


def test_a_risky_gamma_is_warned_about() -> None:
    assert check_config(VALUES).warnings() == []
    [warning] = check_config(changed("objective", "gamma", 0.5)).warnings()
    assert "focal/turned_share" in warning


def test_supervised_tuning_needs_no_reference_and_takes_none() -> None:
    values = {**VALUES, "objective": {"name": "sft"}}
    assert "reference: sft compares with no reference" in mistakes(values)
    del values["reference"]
    assert "reference" not in training_arguments(check_config(values))


def test_sources_take_the_keys_of_their_section_unless_they_have_their_own() -> None:
    data = {"train": ["a.jsonl", {"path": "b.csv", "form": "explicit"}], "eval": "c.jsonl", "form": "sharegpt"}
    config = check_config({**VALUES, "data": data})
    assert [source.form for source in config.data.sources("train")] == ["sharegpt", "explicit"]
    assert [(source.path, source.form) for source in config.data.sources("eval")] == [("c.jsonl", "sharegpt")]
    assert (
        check_config({**VALUES, "data": {"train": "a.jsonl", "eval": "a.jsonl"}}).data.sources("train")[0].form is None
    )


def test_a_missing_reference_is_told_beside_the_other_mistakes_with_an_example() -> None:
    told = mistakes({"name": "run", "objective": {"name": "focalpo", "beta": 0.1}})
    assert "reference: missing; it has no default (for example reference: {kind: disabled_adapter})" in told
    for section in ("model", "data", "training"):
        assert f"{section}: missing" in told
