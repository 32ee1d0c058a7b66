"""Exports: which files each form holds, which options it takes, and that it is there complete or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafocal.errors import InputError
from lorafocal.model.saved import read_adapter
from lorafocal.release import bundle
from lorafocal.release.combine import combine
from lorafocal.release.export import export
from lorafocal.release.gate import GateFailure
from lorafocal.release.merge import merge_adapter
from tests.saved_run import SavedRun, save_run
from tests.test_card import RUN

pytestmark = pytest.mark.slow  # whole models are written and loaded again

ADAPTER_FILES = {
    "README.md", "lorafocal.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """A run with a manifest and metrics, whose adapter folder somebody has used."""
    run = save_run(tmp_path_factory.mktemp("run"))
    (run.folder / "manifest.json").write_text(json.dumps(RUN))
    lines = [{"step": 1, "loss": 0.6}, {"step": 3, "eval_loss": 0.5, "eval_rewards/accuracies": 0.625}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.adapter / "optimizer.pt").write_bytes(b"state")
    (run.adapter / "notes.txt").write_text("mine")
    config = run.adapter / "adapter_config.json"
    private = {"base_model_name_or_path": str(run.base)}
    config.write_text(json.dumps(json.loads(config.read_text()) | private))
    return run


def names_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.row("51", "52")
def test_an_adapter_alone_is_peft_s_files_and_papers(run: SavedRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(run.adapter, out, form="adapter", onto="auto", gate_dtype="float32", pairs=None)
    assert names_of(out) == ADAPTER_FILES == set(report.files)
    assert (out / "adapter_model.safetensors").read_bytes() == (run.adapter / "adapter_model.safetensors").read_bytes()
    then, now = (json.loads((folder / "adapter_config.json").read_text()) for folder in (run.adapter, out))
    assert now == then | {"base_model_name_or_path": "base"}
    for path in out.iterdir():
        assert str(run.base.parent).encode() not in path.read_bytes(), path.name
    card = (out / "README.md").read_text()
    for expected in ("| eval_rewards/accuracies | 0.625 |", "## Data", "## Recipe", "lora of rank 4, alpha 8"):
        assert expected in card
    assert report.merge is None
    assert "7 files" in report.table()


def test_several_adapters_are_one(run: SavedRun, tmp_path: Path) -> None:
    export([run.adapter, run.adapter], tmp_path / "out", form="adapter", weights=(1, -0.5))
    (tmp_path / "expected").mkdir()
    saved = read_adapter(run.adapter)
    combine([saved, saved], (1, -0.5), tmp_path / "expected")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_merged_is_what_merge_writes(run: SavedRun, tmp_path: Path) -> None:
    report = export(run.adapter, tmp_path / "a", form="merged", dtype="float32")
    merge_adapter(run.adapter, tmp_path / "b", dtype="float32")
    assert set(report.files) == names_of(tmp_path / "b")
    for name in names_of(tmp_path / "b"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert report.merge is not None
    assert json.loads(json.dumps(report.as_dict()))["merge"]["gate"]["passed"] is True


def test_options_that_a_form_does_not_have_are_refused(run: SavedRun, tmp_path: Path) -> None:
    for given, message in (
        ({"form": "awq"}, "--as 'awq' is unknown: choose one of bundle, merged, adapter, nf4"),
        ({"form": "adapter", "dtype": "float32", "max_drift": 0.2}, "no use for --dtype, --max-drift"),
        ({"form": "adapter", "onto": "original"}, "no use for --onto"),
        ({"form": "nf4", "converter": tmp_path}, "go with --as gguf"),
        ({"form": "bundle", "outtype": "f16"}, "go with --as gguf"),
    ):
        with pytest.raises(InputError, match=message):
            export(run.adapter, tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["bundle", "nf4", "merged"])
def test_a_gate_that_fails_leaves_nothing(run: SavedRun, tmp_path: Path, form: str) -> None:
    with pytest.raises(GateFailure):
        export(run.adapter, tmp_path / "out", form=form, max_drift=1e-4)
    assert not list(tmp_path.iterdir())


def test_a_base_that_nothing_vouches_for_is_said_of_an_adapter_alone_too(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.adapter, tmp_path / "adapter")
    (folder / "lorafocal.json").unlink()
    [note] = export(folder, tmp_path / "out", form="adapter", base=str(run.base)).notes
    assert "has no lorafocal.json" in note


@pytest.mark.row("47")
def test_an_adapter_that_is_not_finite_is_not_packaged(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run") / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"{name} is empty or not finite"):
        export(folder, tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_to_be_copied_again(run: SavedRun, tmp_path: Path) -> None:
    file = shutil.copytree(run.folder, tmp_path / "run") / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged: .*Copy it again"):
        export(file.parent, tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def test_a_kill_before_the_last_file_leaves_nothing_under_the_name(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killing:
        killing.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a forked process that loads in threads fails now and then
        killing.setattr(bundle, "manifest_of", lambda folder: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=export, args=(run.adapter, tmp_path / "out"))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export(run.adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
