"""Where a plan finds the model's shape, and the bits that its weights are stored in, without a network."""

from __future__ import annotations

import json

import pytest

from lorafocal.config import load_config
from lorafocal.errors import InputError
from lorafocal.memory import Shape
from lorafocal.plan import plan
from tests.test_plan import LORA, config

pytestmark = pytest.mark.slow


@pytest.mark.row("37")
def test_the_shape_comes_from_a_local_folder_or_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shape = config().model.shape
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    local = plan(config(f"model.name={tmp_path}", "model.shape=null"), "1xH100")
    assert local.machines == plan(config(), "1xH100").machines
    with pytest.raises(
        InputError, match=r"model.shape is missing.*config.json of meta-llama.* is not on this machine.*hf download"
    ):
        plan(config("model.shape=null"), "1xH100")
    with pytest.raises(InputError, match=f"hf download MODEL config.json --revision {'a' * 40}`"):
        plan(config("model.shape=null", f"model.revision={'a' * 40}"), "1xH100")


def test_a_local_folder_of_quantised_weights_is_held_as_it_is_stored(tmp_path):
    """And no other word is advised, which would be refused at load."""
    shape, stored = config().model.shape, {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape | {"quantization_config": stored}), encoding="utf-8")
    local = plan(config(f"model.name={tmp_path}"), "1x10GiB")
    assert local.machines == plan(config("model.quantization=int8"), "1x10GiB").machines
    assert not any("model.quantization" in line for line in local.advice)
    file.write_text(json.dumps(shape | {"quantization_config": {"quant_method": "awq"}}), encoding="utf-8")
    with pytest.raises(InputError, match="quantised with awq, which lorafocal does not train"):
        plan(config(f"model.name={tmp_path}"), "1x10GiB")


@pytest.mark.parametrize("revision", [None, "a" * 40], ids=["branch", "commit"])
def test_a_model_of_the_hubs_cache_has_the_shape_and_the_bits_that_are_kept_there(tmp_path, monkeypatch, revision):
    stated = config(file=LORA).model.shape
    place = tmp_path / "models--owner--model"
    for folder in ("refs", f"snapshots/{'a' * 40}"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    kept = place / "snapshots" / ("a" * 40) / "config.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = load_config(LORA, ["model.shape=null", "model.name=owner/model", f"model.revision={revision or 'null'}"])
    for content, quantization in ((stated, None), (stated | {"quantization_config": stored}, "nf4")):
        kept.write_text(json.dumps(content))
        work = plan(run, "1xH200").work
        assert work.shape == Shape.of(stated)
        assert work.setup.quantization == quantization
