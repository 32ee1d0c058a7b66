"""Runs that build on one another, by their configs alone: supervised, continued, compared with another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal import run
from lorafocal.config import Config, check_config
from lorafocal.errors import InputError
from lorafocal.evaluate.score import score_file
from lorafocal.model.load import load_base, load_tokenizer
from lorafocal.objectives.focal import identity_loss
from lorafocal.release.merge import merge_adapter
from tests.saved_run import other_tokenizer, save_base
from tests.toy_run import metric_lines, run_config, write_inputs

pytestmark = pytest.mark.slow


def changed(config: Config, **sections: Any) -> Config:
    values = config.model_dump(exclude_unset=True) | sections
    return check_config({key: value for key, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def supervised(root: Path) -> run.RunSummary:
    config = changed(run_config(root), name="sft", objective={"name": "sft"}, reference=None)
    return run.train(config, quiet=True, runs_dir=root / "runs")


def continued(root: Path, supervised: run.RunSummary, name: str) -> Config:
    adapter = {"start_from": str(supervised.folder / "adapter")}
    return changed(run_config(root), name=name, adapter=adapter, reference={"kind": "frozen_copy"})


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_supervised_run_raises_the_chosen_answers(supervised: run.RunSummary) -> None:
    lines = metric_lines(supervised.folder, key="eval_loss")
    assert lines[-1]["eval_logps/chosen"] > lines[0]["eval_logps/chosen"]
    assert "held out: loss" in str(supervised)
    assert not any("margins" in key for key in lines[-1])  # nothing is compared, so nothing is claimed


@pytest.mark.row("1", "5", "8")
def test_a_continued_run_starts_at_the_identity_and_its_merge_holds_both_stages(
    root: Path, supervised: run.RunSummary, tmp_path: Path
) -> None:
    config = changed(
        continued(root, supervised, "continued"),
        training={**run_config(root).training.model_dump(exclude_unset=True), "logging_steps": 1},
    )
    done = run.train(config, quiet=True, runs_dir=root / "runs")
    assert metric_lines(done.folder)[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)
    assert sorted(path.name for path in (done.folder / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "lorafocal.json",
    ]  # fmt: skip
    merge_adapter(done.folder / "adapter", tmp_path / "merged", base=str(root / "base"), dtype="float32")
    pairs = root / "eval.jsonl"
    live = score_file(done.folder / "adapter", pairs, base=str(root / "base")).scores
    merged = score_file(tmp_path / "merged", pairs).scores
    for ours, theirs in zip(live, merged, strict=True):
        assert ours.chosen_logps == pytest.approx(theirs.chosen_logps, abs=1e-3)
    lineage = json.loads((tmp_path / "merged" / "lorafocal.json").read_text())
    assert [stage["objective"]["name"] for stage in lineage["parents"]] == ["sft", "focalpo"]


@pytest.mark.row("55")
def test_a_continued_run_resumes_to_the_same_bits(root: Path, supervised: run.RunSummary, tmp_path: Path) -> None:
    config = continued(root, supervised, "whole")
    whole = run.train(config, quiet=True, runs_dir=tmp_path)
    parts = shutil.copytree(whole.folder, tmp_path / "again" / whole.folder.name)
    for later in parts.glob("checkpoint-*"):
        if int(later.name.rpartition("-")[2]) > 4:
            for file in later.iterdir():
                if file.is_file():
                    file.unlink()  # torn: the run goes on from step 4
    shutil.rmtree(parts / "adapter")
    resumed = run.train(config, resume=True, quiet=True, runs_dir=tmp_path / "again")
    ours, theirs = adapter_of(resumed.folder), adapter_of(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_separate_model_is_the_reference_and_is_never_saved(root: Path, supervised: run.RunSummary) -> None:
    merged = root / "merged-sft"
    merge_adapter(supervised.folder / "adapter", merged, base=str(root / "base"), dtype="float32")
    config = changed(run_config(root), name="separate", reference={"kind": "separate_model", "model": str(merged)})
    done = run.train(config, quiet=True, runs_dir=root / "runs")
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["reference_model"]["name"] == "merged-sft"
    first = metric_lines(done.folder, key="eval_loss")[0]
    assert first["eval_logps/reference_chosen"] != pytest.approx(first["eval_logps/chosen"], abs=1e-3)
    assert not list(done.folder.rglob("model*.safetensors"))


@pytest.mark.row("7")
def test_a_separate_model_of_another_tokenizer_is_refused_before_anything_is_made(root: Path, tmp_path: Path) -> None:
    other = other_tokenizer(save_base(tmp_path / "other"))
    config = changed(run_config(root), reference={"kind": "separate_model", "model": str(other)})
    with pytest.raises(InputError, match=r"other does not share the tokenizer: 2 tokens have another id"):
        run.train(config, quiet=True, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_separate_model_that_is_held_otherwise_is_told_as_the_references_mistake(root: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    load_base(str(root / "base"), dtype="float32", quantization="nf4").save_pretrained(quantised)
    load_tokenizer(str(root / "base")).save_pretrained(quantised)
    config = changed(
        run_config(root, model__quantization="int8"),
        reference={"kind": "separate_model", "model": str(quantised)},
    )
    with pytest.raises(InputError, match=r"^reference\.model, which is held as the policy's base is: .*nf4"):
        run.train(config, quiet=True, runs_dir=tmp_path / "runs")


def test_what_a_run_builds_on_must_be_there(root: Path, tmp_path: Path) -> None:
    config = changed(run_config(root), adapter={"start_from": "nowhere"}, reference={"kind": "frozen_copy"})
    with pytest.raises(InputError, match=r"adapter\.start_from: nowhere holds no adapter_config\.json"):
        run.train(config, quiet=True, runs_dir=tmp_path / "runs")
    config = changed(run_config(root), reference={"kind": "separate_model", "model": "./nowhere"})
    with pytest.raises(InputError, match=r"\./nowhere: there is no such folder"):
        run.train(config, quiet=True, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_refused_first_step_leaves_the_name_free_for_the_way_out_that_it_names(root: Path, tmp_path: Path) -> None:
    objective = {"name": "simpo", "beta": 10.0, "focal": {"gamma": 1.0}}
    short = run_config(root, training__num_train_epochs=None, training__max_steps=1)
    turned = changed(short, objective=objective, reference=None)
    for _ in range(2):
        with pytest.raises(InputError, match=r"objective\.guard: clip"):
            run.train(turned, quiet=True, runs_dir=tmp_path)
    clipped = changed(turned, objective=objective | {"guard": "clip"})
    assert run.train(clipped, quiet=True, runs_dir=tmp_path).steps == 1
    with pytest.raises(InputError, match="already holds a run"):
        run.train(clipped, quiet=True, runs_dir=tmp_path)
