"""Merging what was trained on a quantised base: onto the weights that training saw, as floats, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from lorafocal.data.held_out import write_held_out
from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.lineage import lineage_of
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import load_base
from lorafocal.model.quantized import QUANTIZATIONS, dequantized_weight, quantization_of, word_of
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.release import merge
from lorafocal.release.dequantize import dequantize
from lorafocal.release.gate import GateFailure
from lorafocal.release.merge import merge_adapter
from tests.model.families import random_model
from tests.saved_run import SavedRun, held_out_pairs, quantized_checkpoint, save_base, save_run
from tests.tiny import lora, trainer

pytestmark = pytest.mark.slow  # whole models are written and loaded again

PAIRS = held_out_pairs(12)


def what_training_saw(run: SavedRun, quantization: str, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Every weight of the live policy, B A added by PEFT's definition, in float32."""
    base = load_base(str(run.base), dtype=dtype, quantization=quantization)
    policy = PeftModel.from_pretrained(base, run.adapter)
    weights = {name: tensor.float() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    for name, layer in policy.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] = dequantized_weight(layer) + layer.get_delta_weight("default")
        elif word_of(layer) and not name.endswith("base_layer"):
            weights[f"{name}.weight"] = dequantized_weight(layer)
    return weights


def logps_of(model: nn.Module) -> torch.Tensor:
    prepare_policy(model.eval())
    with torch.no_grad():
        return torch.cat(sequence_logps(model, share_prefixes(PAIRS)))


@pytest.mark.row("41", "42")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_merged_weights_are_those_of_training_plus_the_change(tmp_path: Path, quantization: str) -> None:
    run = save_run(tmp_path, quantization=quantization, dtype="float32", target_modules=["q_proj", "down_proj"])
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    assert report.gate.drift_rms < 1e-5
    expected = what_training_saw(run, quantization, "float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == load_file(run.base / "model.safetensors").keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    original = load_base(str(run.base), dtype="float32").state_dict()
    assert not torch.allclose(
        merged["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.row("41", "42")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stored_in_bfloat16_it_loses_what_rounding_costs_any_merge(tmp_path: Path, quantization: str) -> None:
    quantised = save_run(tmp_path / "q", std=0.1, quantization=quantization)
    plain = save_run(tmp_path / "f", std=0.1)
    lost = [merge_adapter(run.adapter, run.folder / "out").gate.lost for run in (quantised, plain)]
    assert 0 < lost[0] < 4 * lost[1] < 0.1
    assert {t.dtype for t in load_file(quantised.folder / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.row("42")
def test_files_and_words_say_which_base_it_was(tmp_path: Path) -> None:
    run = save_run(tmp_path, quantization="nf4-double")
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run.base))
    assert config == base | {"dtype": "float32"}
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["base_dequantized_from"] == "nf4-double"
    assert "quantised to nf4-double, so it was merged into those weights de-quantised again" in report.table()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "de-quantised again (what training saw), not into the original ones" in card
    assert "stage 1: focalpo adapter `adapter` (trained on NF4 (double quantisation)), merged" in card
    lineage = lineage_of(tmp_path / "out")
    assert lineage is not None
    assert (lineage.quantization, lineage.parents[-1].quantization) == ("nf4-double", "nf4-double")
    second = trainer(tmp_path / "second", run.pairs, model=load_base(str(tmp_path / "out")), peft_config=lora())
    after = second.lineage()
    assert after is not None
    assert (after.quantization, after.parents[0].quantization) == (None, "nf4-double")


@pytest.mark.row("41", "42")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_already_merges_alike(tmp_path: Path, quantization: str) -> None:
    base = quantized_checkpoint(save_base(tmp_path / "floats"), tmp_path / "base", quantization)
    run = trainer(tmp_path / "run", PAIRS, PAIRS, model=load_base(str(base)), peft_config=lora())
    run.train()
    run.save_model()
    write_held_out(tmp_path / "run" / "held_out.jsonl", PAIRS)
    report = merge_adapter(tmp_path / "run" / "adapter", tmp_path / "out", base=str(base), dtype="float32")
    assert report.quantization == quantization
    assert report.gate.lost < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert quantization_of(load_base(str(tmp_path / "out"))) is None


@pytest.mark.row("42", "45")
@pytest.mark.parametrize("family", ["gpt2", "qwen2_vl"])
def test_transposed_layers_and_inner_models_come_back_as_they_were(tmp_path: Path, family: str) -> None:
    random_model(family, torch.float32).save_pretrained(tmp_path / "base")
    base = save_base(tmp_path / "tokenizer").parent / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    model = load_base(str(base), dtype="float32", quantization="nf4")
    run = trainer(tmp_path / "run", PAIRS, model=model, peft_config=lora())
    run.train()
    run.save_model()
    write_held_out(tmp_path / "run" / "held_out.jsonl", PAIRS)
    report = merge_adapter(tmp_path / "run" / "adapter", tmp_path / "out", base=str(base), dtype="float32")
    assert report.gate.learned_rms > 0.01
    assert report.gate.lost < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_dequantize_leaves_a_model_that_computes_the_same(tmp_path: Path) -> None:
    ids = torch.arange(2, 12)[None]
    for word in QUANTIZATIONS:
        model = load_base(str(save_base(tmp_path / word)), dtype="float32", quantization=word).eval()
        with torch.no_grad():
            live = model(ids).logits
            dequantize(model, torch.float32)
            assert all(word_of(layer) is None for layer in model.modules())
            torch.testing.assert_close(model(ids).logits, live, rtol=1e-4, atol=1e-4)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        names = set(model.state_dict())
        dequantize(model, torch.float32)
        assert set(model.state_dict()) == names


@pytest.mark.row("6", "41")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "uses dora, which merge does not fold"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [3]}, "uses trainable_tokens"),
    ],
)
def test_what_is_not_b_times_a_is_published_unmerged(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    run = save_run(tmp_path, quantization="nf4", **settings)
    with pytest.raises(InputError, match=rf"{named}.*Publish the adapter as it is"):
        merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.row("6")
@pytest.mark.parametrize(
    ("init", "quantization"), [("pissa", None), ("olora", None), ("loftq", "nf4"), ("eva", "int8")]
)
def test_adapters_from_every_start_open_and_merge_like_plain_ones(
    tmp_path: Path, init: str, quantization: str | None
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    model = load_base(str(base), dtype="float32", quantization=quantization)
    config = lora(target_modules=["q_proj", "down_proj"], init_lora_weights=init if init != "loftq" else True)
    config.init_lora_weights = init  # PEFT's constructor takes "loftq" only with scipy
    run = trainer(tmp_path / "run", PAIRS, model=model, peft_config=config, reference="frozen_copy")
    run.train()
    run.save_model()
    write_held_out(tmp_path / "run" / "held_out.jsonl", PAIRS)
    adapter = tmp_path / "run" / "adapter"
    assert run.lineage().parents == ()  # type: ignore[union-attr]
    policy = continue_adapter(load_base(str(base), dtype="float32", quantization=quantization), adapter)
    torch.testing.assert_close(logps_of(policy), logps_of(run.model), rtol=1e-5, atol=1e-4)
    report = merge_adapter(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert report.gate.lost < 1e-3


@pytest.mark.row("42")
def test_the_gate_tells_the_original_weights_from_those_of_training(tmp_path: Path) -> None:
    """What a merge onto the float original would be: the gate must not take it for the adapter."""
    run = save_run(tmp_path, std=0.01, quantization="nf4")

    def original(layer: nn.Module) -> torch.Tensor:
        return originals[tuple(layer.weight.shape), float(layer.weight.float().sum())]

    originals: dict[object, torch.Tensor] = {}
    floats = load_base(str(run.base))
    for name, layer in load_base(str(run.base), quantization="nf4").named_modules():
        if word_of(layer):
            key = tuple(layer.weight.shape), float(layer.weight.float().sum())
            originals[key] = floats.get_submodule(name).weight.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "dequantized_weight", original)
        with pytest.raises(GateFailure, match="the merged model is not the adapter"):
            merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
