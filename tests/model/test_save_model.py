"""A whole model on disk is the model: plain transformers loads it as it is, under the names that others know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lorafocal.errors import InputError
from lorafocal.lineage import FULL, BaseIdentity, Lineage, Stage, lineage_of
from lorafocal.model.adapters import attach_lora
from lorafocal.model.continued import lineage_on, stages_of
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.model.save_model import write_papers, write_weights
from lorafocal.model.shrunk import build, shrunk
from tests.tiny import lora, tiny_base

pytestmark = pytest.mark.slow

# What transformers holds otherwise than files do (experts as one), ties, has buffers that are saved, or computes wide.
FAMILIES = ["llama", "mixtral", "deepseek_v3", "gpt2", "gemma2", "phi3", "qwen3_moe"]


def whole(parameter: Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


def small(kind: str) -> PreTrainedModel:
    return build(shrunk(AutoConfig.for_model(kind), tokens=17, eos=1), dtype=torch.float32, seed=0)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()  # type: ignore[assignment]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("most", [10**9, 5000], ids=["one file", "several"])
def test_it_is_what_transformers_itself_writes(kind: str, most: int, tmp_path: Path) -> None:
    model = small(kind)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", model, whole, dtype=torch.float32, most=most)
    write_papers(tmp_path / "ours", model, None, None, dtype=torch.float32)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert same(again, model)
    if most == 5000:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theirs.values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert len(files) > 1


@pytest.mark.row("47")
@pytest.mark.parametrize("wrong", [torch.empty(0), torch.full((8, 8), float("nan"))], ids=["empty", "not finite"])
def test_what_was_not_gathered_is_not_written(wrong: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_base()
    last = list(model.parameters())[-1]
    with pytest.raises(InputError, match=r"is empty|NaN"):
        write_weights(tmp_path, model, lambda p: wrong if p is last else whole(p), dtype=torch.float32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_base()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 5], do_sample=True, temperature=0.7)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lineage(model: PreTrainedModel, **more: Any) -> Lineage:
    made = lineage_on(model, (), objective={"name": "focalpo", "beta": 0.1}, steps=6, pairs_seen=40, **more)
    assert made is not None
    return made


def written(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    write_weights(folder, model, whole, dtype=dtype)
    write_papers(folder, model, None, lineage(model), {"eval_rewards/margins": 1.5}, dtype=dtype)
    return folder


def test_config_and_generation_settings_are_the_bases(base: Path, tmp_path: Path) -> None:
    """Training switches the cache off, and exchanges the attention, for itself."""
    model = load_base(str(base), dtype="float32")
    folder = written(tmp_path / "model", model, torch.bfloat16)
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    assert ours == theirs | {"dtype": "bfloat16"}
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_no_place_on_the_base_s_machine_goes_with_the_model(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        record = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(record | {"made_from": "/home/alice/secret"}))
    folder = written(tmp_path / "model", load_base(str(base), dtype="float32"))
    assert not any("alice" in file.read_text() for file in folder.glob("*.json"))


def test_what_is_made_of_the_model_remembers_how_the_model_was_made(base: Path, tmp_path: Path) -> None:
    first = written(tmp_path / "first", load_base(str(base), dtype="float32"))
    start, weights = base_fingerprint(str(base)), base_fingerprint(str(first))["sha256"]
    made = lineage_of(first)
    assert made is not None
    assert made.base == BaseIdentity(**start)  # type: ignore[arg-type]
    training = {"objective": {"name": "focalpo", "beta": 0.1}, "reference": "disabled_adapter"}
    assert made.parents == (Stage("model", str(weights), FULL, **training, steps=6, pairs_seen=40),)
    assert json.loads((first / "lorafocal.json").read_text())["format"] == 3  # older versions would misread it

    second = load_base(str(first), dtype="float32")
    assert lineage(second).parents == made.parents
    assert lineage(second).first_base == made.base
    assert lineage(second).base.sha256 == weights
    twice = lineage_of(written(tmp_path / "second", second))
    assert [stage.how for stage in twice.parents] == [FULL, FULL]  # type: ignore[union-attr]

    policy = attach_lora(load_base(str(first), dtype="float32"), lora())
    adapter = lineage_on(policy.get_base_model(), stages_of(policy), objective=None, steps=0, pairs_seen=0)
    assert adapter is not None
    assert adapter.parents == made.parents
    assert adapter.contained == ()  # it is in the base, and no part of the adapter
    assert "training of all weights" in str(made.parents[0])


def test_the_card_says_what_it_is_and_how_it_is_loaded(base: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", load_base(str(base), dtype="float32"))
    card = (folder / "README.md").read_text()
    assert "preference-tuned at full parameters" in card
    assert "stage 1: focalpo training of all weights, sha256" in card
    assert "| eval_rewards/margins | 1.5 |" in card
    assert "lora\n" not in card
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors")
    code = card.partition("```python\n")[2].partition("```")[0].split("tokenizer =")[0]
    names: dict[str, Any] = {}
    exec(code.replace("THIS_MODEL", str(folder)), names)
    assert names["model"].dtype == torch.float32
