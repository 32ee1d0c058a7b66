"""Merging what was trained on a quantised base: onto the weights that training saw, as floats, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from lorafocal.compatibility import QUANTIZED
from lorafocal.data.held_out import write_held_out
from lorafocal.lineage import lineage_of
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import load_base
from lorafocal.model.quantized import dequantized_weight, quantization_of, word_of
from lorafocal.model.saved import WEIGHTS_FILE, read_adapter
from lorafocal.release.dequantize import dequantize
from lorafocal.release.gate import GateFailure
from lorafocal.release.merge import merge_adapter
from lorafocal.release.weights import write_merged
from tests.model.families import random_model
from tests.saved_run import SavedRun, held_out_pairs, logps_of, quantized_checkpoint, save_base, save_run
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


@pytest.mark.row("41", "42")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_the_merged_weights_are_those_of_training_plus_the_change(
    tmp_path: Path, quantization: str, dtype: str
) -> None:
    """Tensor by tensor, without loading the model: bit for bit what loading makes of each."""
    settings = {"quantization": quantization, "dtype": dtype, "target_modules": ["q_proj", "down_proj"]}
    run = save_run(tmp_path, base_dtype=torch.float32, **settings)
    (tmp_path / "out").mkdir()
    written = write_merged(read_adapter(run.adapter), tmp_path / "out", onto="trained", dtype="float32")
    assert written.notes == ()
    expected = what_training_saw(run, quantization, dtype)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(run.base / "model.safetensors")
    assert merged.keys() == original.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        if "q_proj" in name or "down_proj" in name:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, expected[name]), name
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(merged[up], original[up])


@pytest.mark.row("42")
def test_onto_the_original_it_is_the_stored_floats_plus_the_change(tmp_path: Path) -> None:
    """Also where the base is stored in 4 bits, and its floats lie elsewhere."""
    run = save_run(tmp_path, base_dtype=torch.float32, quantization="nf4", target_modules=["q_proj"])
    stored = quantized_checkpoint(run.base, tmp_path / "four", "nf4")
    saved = read_adapter(run.adapter)
    places = [(saved, None), (replace(saved, base=str(stored)), str(run.base))]
    adapter, original = (load_file(file) for file in (run.adapter / WEIGHTS_FILE, run.base / "model.safetensors"))
    for number, (adapted, floats) in enumerate(places):
        out = tmp_path / f"out{number}"
        out.mkdir()
        assert write_merged(adapted, out, onto="original", original=floats, dtype="float32").notes == ()
        merged = load_file(out / "model.safetensors")
        for name, tensor in original.items():
            a, b = (adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "AB")
            assert torch.equal(merged[name], tensor if a is None else tensor + (8 / 4) * (b @ a))


@pytest.mark.row("41", "42")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stored_in_bfloat16_it_loses_what_rounding_costs_any_merge(tmp_path: Path, quantization: str) -> None:
    quantised = save_run(tmp_path / "q", std=0.1, quantization=quantization)
    plain = save_run(tmp_path / "f", std=0.1)
    folders = {run.adapter: onto for run, onto in ((quantised, "trained"), (plain, "auto"))}
    lost = [merge_adapter(folder, folder.parent / "out", onto=onto).gate.lost for folder, onto in folders.items()]
    assert 0 < lost[0] < 4 * lost[1] < 0.1
    assert {t.dtype for t in load_file(quantised.folder / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.row("42")
def test_files_and_words_say_which_base_it_was(tmp_path: Path) -> None:
    run = save_run(tmp_path, quantization="nf4-double")
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32", onto="trained")
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
    for word in QUANTIZED:
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
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 9]}],
)
def test_what_is_more_than_b_times_a_merges_onto_few_bits_too(tmp_path: Path, settings: dict[str, object]) -> None:
    run = save_run(tmp_path, quantization="nf4", **settings)
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32", onto="trained")
    assert report.gate.learned_rms > 0.01
    assert report.gate.lost < 1e-4


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
    torch.testing.assert_close(logps_of(policy, PAIRS), logps_of(run.model, PAIRS), rtol=1e-5, atol=1e-4)
    report = merge_adapter(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert report.gate.lost < 1e-3


@pytest.mark.row("42")
def test_the_gate_tells_the_original_weights_from_those_of_training(tmp_path: Path) -> None:
    """A merge onto the float original is another model: the gate must not take it for the adapter."""
    run = save_run(tmp_path, std=0.01, quantization="nf4")
    with pytest.raises(GateFailure, match="the merged model is not the adapter"):
        merge_adapter(run.adapter, tmp_path / "out", dtype="float32", onto="original")
