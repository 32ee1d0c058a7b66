"""The digest of a config.json: of what it has weights compute, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config, LlamaConfig, PreTrainedConfig

from lorafocal.model.base_config import config_sha256

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder / "config.json"


def read(file: Path) -> str:
    return config_sha256(AutoConfig.from_pretrained(file.parent))


def changed(file: Path, **values: Any) -> str:
    """The digest of `file` with these values; None takes one out."""
    record = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    return read(file)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": ROPE | {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 4},
        {"model_type": "mistral"},
    ],
)
def test_what_is_computed_counts(tmp_path: Path, values: dict[str, Any]) -> None:
    file = saved(tmp_path, LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert read(file) != changed(file, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"transformers_version": "4.40.0", "dtype": "float16", "use_cache": False, "_name_or_path": "/elsewhere"},
        {"unsloth_version": "1", "initializer_range": 0.5, "pad_token_id": 7},
        {"rms_norm_eps": None, "mlp_bias": None},  # as the class has them
        {"rope_parameters": ROPE | {"rope_theta": 10000}},
        {"rope_parameters": None, "rope_theta": 10000.0},  # as transformers 4 wrote it
    ],
)
def test_what_says_where_it_is_from_and_how_it_was_saved_does_not(tmp_path: Path, values: dict[str, Any]) -> None:
    file = saved(tmp_path, LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert read(file) == changed(file, **values)


def test_parts_of_a_composite_model_count_alike(tmp_path: Path) -> None:
    file = saved(tmp_path, Gemma3Config())
    before, text = read(file), json.loads(file.read_text())["text_config"]
    assert changed(file, text_config=text | {"use_cache": False}) == before
    assert changed(file, text_config=text | {"rms_norm_eps": 0.1}) != before


class Undecided(LlamaConfig):
    def __init__(self, **settings: Any) -> None:
        if not settings:
            raise RuntimeError("say a size")
        super().__init__(**settings)


def test_of_a_class_without_defaults_all_counts() -> None:
    one, other = (Undecided(hidden_size=64, num_attention_heads=4, rms_norm_eps=eps) for eps in (1e-6, 1e-5))
    assert config_sha256(one) != config_sha256(other)
