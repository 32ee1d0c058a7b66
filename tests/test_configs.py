"""Every shipped config loads, explains each key, and its shape is the published architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorafocal.config import load_config

FOLDER = Path(__file__).parents[1] / "configs"
BASE = FOLDER / "objectives" / "base.yaml"
METHODS = sorted(
    {path for room in ("objectives", "references", "steps") for path in (FOLDER / room).glob("*.yaml")} - {BASE}
)
OF_THE_PAPER = {*(FOLDER / "paper").rglob("*.yaml")}  # test_recipes.py
CONFIGS = sorted({*FOLDER.rglob("*.yaml")} - OF_THE_PAPER - {*METHODS, BASE})
# Parameters of the published checkpoints.
PARAMETERS = {"llama3-8b": 8_030_261_248, "mistral-7b": 7_241_732_096, "qwen3-8b": 8_190_735_360}
BIG = [f"{kind}/{model}.yaml" for kind in ("lora", "qlora") for model in PARAMETERS]
PUBLISHED = (0.01, 0.05, 128, 1)  # of the paper (Liu et al., ACL 2025): beta, gamma, pairs a step, epochs


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
    assert {name_of(path) for path in CONFIGS} == {"quickstart.yaml", *BIG}


@pytest.mark.parametrize("path", CONFIGS + METHODS, ids=name_of)
def test_it_loads_without_a_warning(path: Path) -> None:
    assert load_config(path).warnings() == []


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_method_is_what_the_base_of_its_folder_lacks(path: Path) -> None:
    """One comment says what it is, and it changes nothing that would make two of them incomparable."""
    text = path.read_text()
    assert text.startswith("# ")
    said = yaml.safe_load(text)
    assert said["extends"] in ("base.yaml", "../objectives/base.yaml")
    assert said["name"] == path.stem
    assert said.keys() <= {"extends", "name", "data", "objective", "reference", "stages"}


@pytest.mark.parametrize("path", [*CONFIGS, BASE], ids=name_of)
def test_each_key_has_a_comment(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    keys = leaves(yaml.compose(text))
    assert len(keys) > 20
    assert [key for key, line in keys if len(lines[line].partition("  # ")[2]) < 10] == []


@pytest.mark.parametrize("name", BIG)
def test_the_paper_values_are_there(name: str) -> None:
    config = load_config(FOLDER / name)
    found = (config.objective.beta, config.objective.gamma, config.training.pairs_per_step)
    assert (*found, config.training.fields["num_train_epochs"]) == PUBLISHED


@pytest.mark.parametrize("name", BIG)
def test_adapters_are_zephyrs(name: str) -> None:
    config = load_config(FOLDER / name)
    assert (config.adapter.r, config.adapter.alpha, config.adapter.targets) == (128, 128, "all-linear")
    assert (config.training.fields["learning_rate"], config.training.warmup_ratio) == (5e-6, 0.1)
    assert config.training.fields["lr_scheduler_type"] == "cosine"


@pytest.mark.parametrize("model", PARAMETERS)
def test_qlora_is_its_twin_in_four_bits(model: str) -> None:
    """The two files of a model differ in what 4 bits and their optimiser are about, and in nothing else."""
    lora, qlora = (load_config(FOLDER / kind / f"{model}.yaml") for kind in ("lora", "qlora"))
    changes = {
        "name": f"{model}-qlora",
        "model": lora.model.model_copy(update={"quantization": "nf4"}),
        "training": lora.training.model_copy(update={"optim": "paged_adamw_32bit"}),
    }
    assert qlora.model_dump() == lora.model_copy(update=changes).model_dump()


@pytest.mark.parametrize("name", BIG)
def test_the_shape_builds_the_published_architecture(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorafocal.model.load import check_shape

    shape = load_config(FOLDER / name).model.shape
    assert shape is not None
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[Path(name).stem]
    check_shape(config, shape)


def test_quickstart_starts_from_the_known_loss() -> None:
    config = load_config(FOLDER / "quickstart.yaml", ["model.name=/base", "data.train=a.jsonl", "data.eval=b.jsonl"])
    assert config.objective.gamma == 0.05
    assert config.model.dtype == "float32"
    assert config.training.fields["logging_first_step"] is True


def test_quickstart_states_the_shape_of_the_base_it_makes() -> None:
    from lorafocal.data.toy import toy_tokenizer
    from lorafocal.model.load import check_shape
    from lorafocal.model.toy_base import ToyRecipe, toy_config

    shape = load_config(FOLDER / "quickstart.yaml").model.shape
    assert shape is not None
    check_shape(toy_config(ToyRecipe(), toy_tokenizer()), shape)
