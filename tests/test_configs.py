"""Every shipped config loads, explains each key, and its shape is the published architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorafocal.config import load_config

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
# Parameters of the published checkpoints.
PARAMETERS = {"lora/llama3-8b.yaml": 8_030_261_248, "lora/mistral-7b.yaml": 7_241_732_096}
PUBLISHED = {  # of the paper (Liu et al., ACL 2025): beta, gamma, pairs a step, epochs
    "lora/llama3-8b.yaml": (0.01, 0.05, 128, 1),
    "lora/mistral-7b.yaml": (0.01, 0.05, 128, 1),
}


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def leaves(node: yaml.Node, prefix: str = "") -> list[tuple[str, int]]:
    """(dotted key, line from 0) of each key whose value is not a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return []
    found = []
    for key, value in node.value:
        inside = leaves(value, f"{prefix}{key.value}.")
        found += inside or [(f"{prefix}{key.value}", key.start_mark.line)]
    return found


def test_configs_are_shipped() -> None:
    assert {"quickstart.yaml", *PARAMETERS} <= {name_of(path) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_it_loads_without_a_warning(path: Path) -> None:
    assert load_config(path).warnings() == []


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_each_key_has_a_comment(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    keys = leaves(yaml.compose(text))
    assert len(keys) > 20
    assert [key for key, line in keys if len(lines[line].partition("  # ")[2]) < 10] == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_paper_values_are_there(name: str) -> None:
    config = load_config(FOLDER / name)
    found = (config.objective.beta, config.objective.gamma, config.training.pairs_per_step)
    assert (*found, config.training.fields["num_train_epochs"]) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_shape_builds_the_published_architecture(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorafocal.model.load import check_shape

    shape = load_config(FOLDER / name).model.shape
    assert shape is not None
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    check_shape(config, shape)


def test_quickstart_starts_from_the_known_loss() -> None:
    config = load_config(FOLDER / "quickstart.yaml", ["model.name=/base", "data.train=a.jsonl", "data.eval=b.jsonl"])
    assert config.objective.gamma == 0.05
    assert config.model.dtype == "float32"
    assert config.training.fields["logging_first_step"] is True
