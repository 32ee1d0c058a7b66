"""Continuing a saved adapter: the same weights in fp32, trainable, on the right base, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, Stage
from lorafocal.model.adapters import check_trainable
from lorafocal.model.continued import continue_adapter, stages_of
from lorafocal.model.load import load_base
from lorafocal.publish import sha256
from tests.saved_run import SavedRun, save_run
from tests.tiny import tiny_base, tiny_policy


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return save_run(tmp_path)


@pytest.mark.row("2", "3", "13")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tensor_is_there_in_fp32_and_trainable_and_nothing_else_is(run: SavedRun, dtype: str) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype=dtype), run.adapter)
    trained = check_trainable(policy)
    stored = load_file(run.adapter / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in trained} == set(stored)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.detach(), stored[name.replace(".default", "")])
    assert {p.dtype for n, p in policy.named_parameters() if n not in trained} == {getattr(torch, dtype)}


def test_it_computes_what_peft_loads(run: SavedRun) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    twin = PeftModel.from_pretrained(load_base(str(run.base), dtype="float32"), run.adapter)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, twin(ids).logits)


@pytest.mark.row("5")
def test_what_came_before_is_remembered_with_its_digest(run: SavedRun) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    [stage] = stages_of(policy)
    assert (stage.adapter, stage.how, stage.steps) == ("adapter", CONTINUED, 3)
    assert stage.sha256 == sha256(run.adapter / "adapter_model.safetensors")
    by_peft = PeftModel.from_pretrained(load_base(str(run.base), dtype="float32"), run.adapter, is_trainable=True)
    assert stages_of(by_peft) == (Stage("default", stage.sha256, CONTINUED),)
    assert stages_of(tiny_policy(trained=False)) == ()


@pytest.mark.row("S13", "5")
def test_another_base_is_refused(run: SavedRun, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"was trained on base .* but .*other has sha256 .*model\.name"):
        continue_adapter(load_base(str(tmp_path / "other"), dtype="float32"), run.adapter)
    with pytest.raises(InputError, match="loaded from nowhere"):
        continue_adapter(tiny_base(), run.adapter)


@pytest.mark.row("6", "45")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*path_initial_model_for_weight_conversion"),
        ({"target_modules": ["lm_head"]}, "lm_head, which is not an inner linear layer"),
    ],
)
def test_a_variant_is_refused_by_its_name(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"]} | settings
    base = load_base(str(tmp_path / "base"), dtype="float32")
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=named):
        continue_adapter(load_base(str(tmp_path / "base"), dtype="float32"), tmp_path / "adapter")


@pytest.mark.row("53")
def test_an_adapter_that_does_not_fit_is_refused_by_tensor(run: SavedRun) -> None:
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(InputError, match=f"{name} is missing"):
        continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    with pytest.raises(InputError, match="not an adapter folder"):
        continue_adapter(load_base(str(run.base), dtype="float32"), run.folder)


def test_an_adapter_of_another_tool_is_continued_without_a_lineage(run: SavedRun) -> None:
    (run.adapter / "lorafocal.json").unlink()
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    check_trainable(policy)
    [stage] = stages_of(policy)
    assert (stage.objective, stage.adapter) == (None, "adapter")
