"""A merged model in fewer bits: what is stored is the quantised merge, and what that cost is measured and said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.model.quantized import dequantized_weight
from lorafocal.release import requantize, verify
from lorafocal.release.export import ExportReport, export
from lorafocal.release.merge import merge_adapter
from tests.model.families import random_model
from tests.saved_run import SavedRun, save_run

pytestmark = pytest.mark.slow  # whole models are written and loaded again

TORCHAO = Path(sys.prefix) / "torchao"
FORMS = ("nf4-double", "int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("run"), tied=True)


@pytest.fixture(scope="module")
def reports(run: SavedRun) -> dict[str, ExportReport]:
    merge_adapter(run.adapter, run.folder / "merged", dtype="float32")
    return {form: export(run.adapter, run.folder / form, form=form, dtype="float32") for form in FORMS}


@pytest.mark.row("41")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_the_merge_quantised_once(run: SavedRun, reports: dict[str, ExportReport], form: str) -> None:
    stored = load_base(str(run.folder / form), dtype="float32")
    expected = load_base(str(run.folder / "merged"), dtype="float32", quantization=form)
    plain = load_file(run.folder / "merged" / "model.safetensors")
    layers = dict(expected.named_modules())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = dequantized_weight(stored.get_submodule(name))
        assert torch.equal(weight, dequantized_weight(layers[name]))
        assert not torch.equal(weight, plain[f"{name}.weight"])
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(stored.get_parameter(name), plain[name])


@pytest.mark.row("41")
@pytest.mark.parametrize("form", FORMS)
def test_the_cost_is_measured_on_the_files_as_a_stranger_loads_them(
    run: SavedRun, reports: dict[str, ExportReport], form: str
) -> None:
    report = reports[form]
    assert report.merge is not None
    assert report.quantized is not None
    model = AutoModelForCausalLM.from_pretrained(run.folder / form, dtype=torch.float32).eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes cannot repack layers as narrow as these
            layer.support_avx512bf16_for_cpu = False
    evidence, cost = report.merge.evidence, report.quantized.after
    found = [
        verify.logp(model, list(pair.prompt_ids), list(answer))
        for answers in ("chosen_ids", "rejected_ids")
        for pair in evidence.pairs
        for answer in [getattr(pair, answers)]
    ]
    drift = torch.tensor(found).double() - torch.cat(evidence.live).double()
    assert cost.drift_rms == pytest.approx(drift.square().mean().sqrt().item(), rel=1e-3)
    assert cost.drift_rms > 10 * report.merge.gate.drift_rms
    written = json.loads((run.folder / form / "quantize.json").read_text())
    assert (written["stored_as"], written["drift_rms"]) == (form, cost.drift_rms)
    assert "passed" not in written
    assert written["bytes_after"] < written["bytes_before"]


@pytest.mark.row("41", "52")
def test_it_is_said_where_it_is_read(run: SavedRun, reports: dict[str, ExportReport]) -> None:
    coarse = reports["nf4-double"]
    assert coarse.quantized is not None
    assert coarse.quantized.after.lost > 0.1
    [note] = coarse.notes
    assert "drifts by" in note
    card = (coarse.folder / "README.md").read_text()
    for expected in (note, coarse.quantized.table(), "pip install bitsandbytes", "| reference | disabled_adapter |"):
        assert expected in card
    assert coarse.quantized.table() in coarse.table()
    names = {path.name for path in coarse.folder.iterdir()}
    assert {"quantize.json", "merge.json", "lorafocal.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "merged" not in names
    for path in coarse.folder.iterdir():
        assert str(run.base.parent).encode() not in path.read_bytes(), path.name
    json.dumps(coarse.as_dict())


def test_a_model_that_would_mostly_stay_as_it_was_is_refused(tmp_path: Path) -> None:
    random_model("qwen3_moe", torch.float32).save_pretrained(tmp_path)
    model = requantize._open(tmp_path, torch.float32, quantization_config=requantize.quantizer("nf4", "float32"))
    with pytest.raises(InputError, match=r"--as nf4: only 3\d% of the inner weights of Qwen3MoeForCausalLM"):
        requantize._check_share(model, "nf4")


def test_without_the_library_nothing_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, form in (("bitsandbytes", "int8"), ("torchao.quantization", "fp8")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(InputError, match=rf"{library.partition('.')[0]}, which does not work here .*pip install"):
            export(Path("nowhere"), tmp_path / "out", form=form)


def test_numbers_that_are_not_finite_are_refused(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requantize.verify, "logp", lambda *a: float("nan"))
    with pytest.raises(InputError, match="not finite"):
        export(run.adapter, tmp_path / "out", form="nf4")
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
@pytest.mark.newest  # PEFT before 0.21 does not work beside this torchao: the extra `fp8` asks for both
def test_fp8_by_torchao_loads_again_bit_for_bit(run: SavedRun, tmp_path: Path) -> None:
    """In a process of its own: once torchao is importable, PEFT imports it at every adapter."""
    assert TORCHAO.is_dir(), f"pip install --no-deps --target {TORCHAO} torchao==0.18.0"
    script = (
        "import sys; sys.path.append(sys.argv[3])\nfrom pathlib import Path\nimport torch\n"
        "from transformers import AutoModelForCausalLM\nfrom lorafocal.release.export import export\n"
        "from lorafocal.release.verify import logp\n"
        "report = export(Path(sys.argv[1]), Path(sys.argv[2]), form='fp8')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)\n"
        "assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == 'Float8Tensor'\n"
        "assert type(model.lm_head.weight).__name__ == 'Parameter'\n"
        "pair = report.merge.evidence.pairs[0]\n"
        "found = logp(model, list(pair.prompt_ids), list(pair.chosen_ids))\n"
        "live = report.merge.evidence.live.chosen[0].item()\n"
        "assert 0 < abs(found - live) <= report.quantized.after.drift_max + 1e-4, (found, live)\n"
        "cost = report.quantized\n"
        "assert cost.before.drift_rms < cost.after.drift_rms < 0.5 * report.merge.gate.learned_rms\n"
    )
    command = [sys.executable, "-c", script, str(run.adapter), str(tmp_path / "out"), str(TORCHAO)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
