"""Which base an adapter is merged into: both are measured, the nearer one is kept, and a wrong choice is caught."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafocal.errors import InputError
from lorafocal.lineage import BaseIdentity, lineage_of
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.model.quantized import dequantized_weight
from lorafocal.model.saved import read_adapter
from lorafocal.release.gate import GateFailure
from lorafocal.release.merge import merge_adapter
from lorafocal.release.onto import bases_to_try, least_drift
from tests.saved_run import SavedRun, quantized_checkpoint, save_base, save_run

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
UNIT = 2.0**-10


def rewrite(run: SavedRun, *, base: dict[str, torch.Tensor] | None = None, adapter: dict[str, torch.Tensor]) -> None:
    """Other tensors in the files of a run, and the digest of its base to match."""
    save_file(adapter, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    if base is not None:
        save_file(base, run.base / "model.safetensors", metadata={"format": "pt"})
    named(run, run.base)


def named(run: SavedRun, base: Path) -> None:
    lineage = lineage_of(run.adapter)
    assert lineage is not None
    replace(lineage, base=BaseIdentity(**base_fingerprint(str(base)))).write(run.adapter)  # type: ignore[arg-type]


def correcting_run(root: Path) -> SavedRun:
    """An adapter that learned nothing but what rounding to NF4 took from its base: D = W - Q(W), exactly."""
    run = save_run(root, quantization="nf4", dtype="float32", r=32, lora_alpha=32, target_modules=LAYERS)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    originals = load_file(run.base / "model.safetensors")
    held = load_base(str(run.base), dtype="float32", quantization="nf4")
    for name in [name for name in adapter if "lora_A" in name]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        adapter[name] = torch.eye(32)
        lost = originals[f"{layer}.weight"].float() - dequantized_weight(held.get_submodule(layer))
        adapter[name.replace("lora_A", "lora_B")] = lost
    rewrite(run, adapter=adapter)
    return run


def run_whose_original_carries_the_change(root: Path) -> SavedRun:
    """Of the int8 base all weights are whole UNITs of 7 bits, so a change of 0.2 UNIT rounds away in bfloat16, whose
    step there is 0.5; the original lies within its rounding so that the sums over inputs keep the change."""
    layer = "model.layers.0.self_attn.v_proj"
    settings: dict[str, Any] = {"r": 1, "lora_alpha": 1, "target_modules": [layer]}
    run = save_run(root, quantization="int8", dtype="float32", base_dtype=torch.float32, **settings)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    learned = {name: tensor.sign() * 0.2 for name, tensor in adapter.items() if "lora_B" in name}
    adapter = {name: torch.ones_like(tensor) for name, tensor in adapter.items()} | {
        name: tensor * UNIT for name, tensor in learned.items()
    }
    base = {name: tensor.bfloat16().float() for name, tensor in load_file(run.base / "model.safetensors").items()}
    base["model.embed_tokens.weight"] = (base["model.embed_tokens.weight"] + 2).bfloat16().float()  # inputs near 1
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in base if "proj" in name]:
        whole = (64 + 62 * torch.rand(base[name].shape, generator=generator)).round() * base[name].sign()
        whole[:, 0] = 127  # the scale of each row
        if name == f"{layer}.weight":
            change = next(iter(learned.values())).expand_as(whole)
            steps = (change.cumsum(1) * 2).round() / 2
            within = torch.cat((torch.zeros(len(whole), 1), steps.diff(dim=1) - change[:, 1:]), 1)
            whole = whole + within
        base[name] = whole * UNIT
    rewrite(run, base=base, adapter=adapter)
    return run


@pytest.mark.row("42")
@pytest.mark.slow
def test_an_adapter_that_corrects_its_base_s_rounding_is_not_merged_onto_the_original(tmp_path: Path) -> None:
    run = correcting_run(tmp_path)
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    assert report.onto == "trained"
    assert report.gates["trained"].lost < 1e-3
    assert report.gates["original"].lost > 0.5
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    for onto, gate in report.gates.items():
        assert written["gates"][onto]["drift_rms"] == gate.drift_rms
        for text in (report.table(), card):
            assert f"{gate.drift_rms:.3g} nats onto the {onto} base" in text
            assert f"{gate.drift_rms:.3g} nats a sequence = {gate.lost:.2%} of it" in text
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    with pytest.raises(GateFailure, match=r"merge onto the trained base \(--onto auto tries both\)"):
        merge_adapter(run.adapter, tmp_path / "forced", dtype="float32", onto="original")
    assert not (tmp_path / "forced").exists()


@pytest.mark.row("42")
@pytest.mark.slow
def test_where_the_original_ends_nearer_it_is_taken_and_the_other_choice_fails(tmp_path: Path) -> None:
    run = run_whose_original_carries_the_change(tmp_path)
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="bfloat16")
    assert report.onto == "original"
    assert report.gates["trained"].lost > 0.9
    assert report.gates["original"].lost < 0.1
    assert "merged into the original floats" in (tmp_path / "out" / "README.md").read_text()
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (written["onto"], written["base_dequantized_from"]) == ("original", None)
    lineage = lineage_of(tmp_path / "out")
    assert lineage is not None
    assert (lineage.quantization, lineage.parents[-1].quantization) == (None, "int8")
    with pytest.raises(GateFailure, match=r"merge onto the original base \(--onto auto tries both\)"):
        merge_adapter(run.adapter, tmp_path / "forced", dtype="bfloat16", onto="trained")


@pytest.mark.row("41", "42")
def test_a_base_that_is_stored_quantised_has_the_original_that_is_named(tmp_path: Path) -> None:
    run = save_run(tmp_path, std=0.3, quantization="nf4")
    stored = quantized_checkpoint(run.base, tmp_path / "stored", "nf4")
    named(run, stored)
    saved = read_adapter(run.adapter, base=str(stored))
    floats = str(run.base)
    assert bases_to_try(saved, "auto", None) == ("trained",)
    assert bases_to_try(saved, "auto", floats) == ("trained", "original")
    assert bases_to_try(saved, "original", floats) == ("original",)
    with pytest.raises(InputError, match=r"stored as nf4.*--original MODEL, or merge with --onto trained"):
        bases_to_try(saved, "original", None)
    with pytest.raises(InputError, match=r"is stored as nf4 too\. Name the float model"):
        bases_to_try(saved, "auto", str(stored))
    merge_adapter(run.adapter, tmp_path / "out", base=str(stored), onto="original", original=floats, max_drift=0.99)
    lineage = lineage_of(tmp_path / "out")
    assert lineage is not None
    assert (lineage.base.sha256, lineage.quantization) == (base_fingerprint(floats)["sha256"], None)


def test_choices_that_an_adapter_does_not_have_are_refused_with_the_way_out(tmp_path: Path) -> None:
    plain, quantised = save_run(tmp_path / "a"), save_run(tmp_path / "b", quantization="nf4")
    floats, four_bits = (read_adapter(run.adapter) for run in (plain, quantised))
    assert bases_to_try(floats, "auto", None) == bases_to_try(floats, "trained", None) == ("trained",)
    assert bases_to_try(four_bits, "auto", None) == ("trained", "original")
    assert bases_to_try(four_bits, "trained", None) == ("trained",)
    for saved, onto, original, named in (
        (floats, "original", None, "trained on a float base.*leave --onto and --original out"),
        (floats, "auto", "x", "trained on a float base.*leave --onto and --original out"),
        (four_bits, "best", None, "choose one of auto, trained, original"),
        (four_bits, "trained", "x", "leave one of the two out"),
        (four_bits, "auto", str(save_base(tmp_path / "c")), "its own original. Leave --original out"),
    ):
        with pytest.raises(InputError, match=named):
            bases_to_try(saved, onto, original)


def test_equal_drifts_keep_what_training_saw_and_no_number_never_wins() -> None:
    def measured(onto: str, drift: float) -> Any:
        return SimpleNamespace(onto=onto, gate=SimpleNamespace(drift_rms=drift))

    for drifts, kept in (((1.0, 1.0), "trained"), ((1.0, 0.5), "original"), ((math.nan, 9.0), "original")):
        tried = [measured(onto, drift) for onto, drift in zip(("trained", "original"), drifts, strict=True)]
        assert least_drift(tried).onto == kept
    assert least_drift([measured("trained", 1.0), measured("original", math.nan)]).onto == "trained"
