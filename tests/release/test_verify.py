"""A bundle's verify.py: passes where all is as published, without anything of ours, and fails on what was changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafocal.publish import sha256
from lorafocal.release import verify
from lorafocal.release.bundle import manifest_of
from lorafocal.release.export import ExportReport, export
from tests.saved_run import SavedRun, save_run

pytestmark = pytest.mark.slow  # whole models are written and loaded again


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("run"), tied=True)


@pytest.fixture(scope="module")
def published(run: SavedRun) -> ExportReport:
    return export(run.adapter, run.folder / "bundle")


@pytest.fixture
def bundle(published: ExportReport, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(published.folder, tmp_path / "bundle")


def mend_manifest(bundle: Path) -> None:
    """What an attacker does after changing a file."""
    (bundle / "manifest.json").write_text(json.dumps(manifest_of(bundle)))


def edit_gate(bundle: Path, change: Callable[[dict], object]) -> None:
    gate = json.loads((bundle / "gate.json").read_text())
    change(gate)
    (bundle / "gate.json").write_text(json.dumps(gate))
    mend_manifest(bundle)


def swap_weights(bundle: Path, base: Path) -> None:
    """The base's weights in place of the merged ones."""
    shutil.copyfile(base / "model.safetensors", bundle / "merged" / "model.safetensors")


def verdict(bundle: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    code = verify.main([str(bundle), *options])
    return code, capsys.readouterr().out


@pytest.mark.engine
def test_a_stranger_with_torch_and_transformers_alone_runs_it(bundle: Path, published: ExportReport) -> None:
    absent = "lorafocal peft trl datasets bitsandbytes accelerate pydantic typer".split()
    script = (
        f"import sys, runpy\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "sys.argv = [sys.argv[1]]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(bundle / "verify.py")], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split() == ["gate", "passed"]
    assert str(published.digest) in done.stdout
    assert str(bundle.parent) not in done.stdout


def test_it_measures_what_the_gate_measured(
    bundle: Path, published: ExportReport, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published.merge is not None
    gate = published.merge.gate
    code, said = verdict(bundle, capsys, "--digest", str(published.digest).upper())
    assert code == 0
    assert "announced           the same" in said
    assert f"learned effect        {gate.learned_rms:.4g} nats" in said
    assert f"rank flips            {gate.rank_flips}" in said
    drift = float(said.partition("drift of the merge")[2].split()[0])
    assert drift == pytest.approx(gate.drift_rms, rel=2e-2, abs=2e-5)
    apart = float(said.partition("from what was stated")[2].split()[0])
    assert apart < 1e-4


def test_a_tampered_weight_fails_with_and_without_a_mended_manifest(
    bundle: Path, run: SavedRun, published: ExportReport, capsys: pytest.CaptureFixture[str]
) -> None:
    swap_weights(bundle, run.base)
    code, said = verdict(bundle, capsys)
    assert (code, "merged/model.safetensors was altered" in said) == (1, True)
    mend_manifest(bundle)
    code, said = verdict(bundle, capsys)
    assert (code, "FAILED                the gate" in said) == (1, True)
    assert "= 100.00% of the learned effect" in said
    edit_gate(
        bundle, lambda gate: [pair.update(live=pair["reference"], merged=pair["reference"]) for pair in gate["logps"]]
    )
    code, said = verdict(bundle, capsys)
    assert code == 0  # consistent lies are found by the digest alone
    assert str(published.digest) not in said
    assert verdict(bundle, capsys, "--digest", str(published.digest))[0] == 1


def test_a_file_missing_altered_or_extra_is_named(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        name = path.relative_to(bundle).as_posix()
        if name in ("manifest.json", "pairs.jsonl"):
            continue
        content = path.read_bytes()
        path.unlink()
        code, said = verdict(bundle, capsys)
        assert (code, f"{name} is missing" in said) == (1, True)
        path.write_bytes(content + b" ")
        code, said = verdict(bundle, capsys)
        assert (code, f"{name} was altered" in said) == (1, True)
        path.write_bytes(content)
    for name in ("merged/more.json", "torch.py", ".hidden", "adapter/notes.txt"):
        (bundle / name).write_text("{}")
        code, said = verdict(bundle, capsys)
        assert (code, f"{name} is not in manifest.json" in said) == (1, True)
        (bundle / name).unlink()
    (bundle / "merged" / "modeling").symlink_to("/etc")  # a folder: what it holds is no file of the bundle
    code, said = verdict(bundle, capsys)
    assert (code, "merged/modeling is not in manifest.json" in said) == (1, True)
    (bundle / "merged" / "modeling").unlink()
    (bundle / "manifest.json").unlink()
    assert verdict(bundle, capsys)[0] == 1


def test_without_its_pairs_the_gate_is_said_not_to_have_run(
    bundle: Path, run: SavedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")  # a hub's own
    (bundle / "pairs.jsonl").unlink()
    code, said = verdict(bundle, capsys)
    assert (code, "NOT RUN" in said, "passed" in said) == (3, True, False)
    swap_weights(bundle, run.base)
    assert verdict(bundle, capsys)[0] == 1


@pytest.mark.row("S9")
def test_what_a_loader_would_take_from_elsewhere_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = bundle / "merged" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    mend_manifest(bundle)
    code, said = verdict(bundle, capsys)
    assert (code, "leads to ../../elsewhere.safetensors" in said) == (1, True)
    index.unlink()
    for name in ("modeling.py", "pytorch_model.bin", "adapter_config.json"):
        (bundle / "merged" / name).write_text("")
        mend_manifest(bundle)
        code, said = verdict(bundle, capsys)
        assert (code, f"merged/{name} may not be part" in said) == (1, True)
        (bundle / "merged" / name).unlink()


def test_a_gate_that_cannot_fail_is_refused(bundle: Path, run: SavedRun, capsys: pytest.CaptureFixture[str]) -> None:
    swap_weights(bundle, run.base)
    edit_gate(bundle, lambda gate: gate.update(max_drift=5))
    assert "which is no gate" in verdict(bundle, capsys)[1]
    for value in (float("nan"), float("inf")):
        edit_gate(
            bundle,
            lambda gate, value=value: (gate.update(max_drift=0.1), gate["logps"][0]["live"].__setitem__(0, value)),
        )
        assert verdict(bundle, capsys)[0] == 1
    (bundle / "pairs.jsonl").write_text("")
    mend_manifest(bundle)
    assert "pairs.jsonl has 0 pairs" in verdict(bundle, capsys)[1]


def test_weights_that_would_be_made_up_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    mend_manifest(bundle)
    code, said = verdict(bundle, capsys)
    assert (code, "lacks tensors of its model" in said, "model.norm.weight" in said) == (1, True, True)


def test_where_memory_is_too_small_it_computes_in_the_dtype_of_the_files_and_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    size = (bundle / "merged" / "model.safetensors").stat().st_size
    monkeypatch.setattr(verify, "memory", lambda: 1.5 * size)
    code, said = verdict(bundle, capsys)
    assert (code, "too little memory for float32" in said, "in bfloat16 on cpu" in said) == (0, True, True)
    assert "in float32 on cpu" in verdict(bundle, capsys, "--dtype", "float32")[1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bundles_of_other_dtypes(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path, std=0.02)
    report = export(run.adapter, tmp_path / "bundle", dtype=dtype)
    assert verdict(tmp_path / "bundle", capsys)[0] == 0
    assert report.digest == sha256(tmp_path / "bundle" / "manifest.json")


def test_papers_that_no_export_writes_fail_in_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        mend_manifest(bundle)
        code, shown = verdict(bundle, capsys)
        assert code == 1
        return shown.splitlines()[-1]

    rows = (bundle / "pairs.jsonl").read_text()
    (bundle / "pairs.jsonl").write_text(rows.replace("prompt_ids", "prompt"))
    assert said().startswith("FAILED                this cannot be checked (KeyError: 'prompt_ids')")
    weights = bundle / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert said().startswith("FAILED                the weights in merged/ cannot be read")
    (bundle / "merged" / "config.json").write_text("{}")
    assert said().startswith("FAILED                this cannot be checked (ValueError")
    edit_gate(bundle, lambda gate: gate.pop("logps"))
    assert said().startswith("FAILED                this cannot be checked (KeyError: 'logps')")
    (bundle / "manifest.json").write_text('{"run": "of training"}')
    assert verdict(bundle, capsys)[0] == 1


def test_it_is_short_enough_to_be_read_and_imports_nothing_of_ours() -> None:
    source = Path(verify.__file__).read_text()
    assert len(source.splitlines()) <= 218
    assert "import lorafocal" not in source
    assert "from lorafocal" not in source
