"""Stages: each begins where the one before ended and is compared with that, and a killed one goes on in its stage."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal.config import Config, check_config
from lorafocal.data.prepare import prepare_data
from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate.score import score_file
from lorafocal.lineage import lineage_of
from lorafocal.objectives.focal import identity_loss
from lorafocal.run import train
from lorafocal.run_folder import read_manifest
from lorafocal.schema import Data
from lorafocal.stages import StagedSummary, stage_configs, train_stages
from lorafocal.trainer import FocalPOTrainer
from tests.toy_run import metric_lines, run_config, write_inputs

ADAPTER = "adapter/adapter_model.safetensors"


def staged(root: Path, **sections: Any) -> Config:
    values = run_config(root, training__num_train_epochs=1, training__logging_steps=1).model_dump(mode="json")
    values |= {"stages": 2, "name": "staged"}
    return check_config({key: values.get(key) for key in values} | sections)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def finished(root: Path) -> StagedSummary:
    return train_stages(staged(root), quiet=True, runs_dir=root / "runs")


def digests(folder: Path) -> list[dict[str, Any]]:
    return [read_manifest(folder / f"stage-{number}")["data"]["train"]["steps"][-1] for number in (1, 2)]


@pytest.mark.slow
def test_every_stage_begins_where_the_one_before_ended_and_is_compared_with_it(finished: StagedSummary) -> None:
    for number in (1, 2):
        first, *_ = metric_lines(finished.folder / f"stage-{number}")
        assert first["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)  # policy and reference are equal
        assert first["rewards/margins"] == 0
    parents = lineage_of(finished.folder / "stage-2" / "adapter").parents
    assert [(parent.how, parent.steps) for parent in parents] == [("continued", 2)]
    assert read_manifest(finished.folder / "stage-2")["config"]["reference"]["kind"] == "frozen_copy"


@pytest.mark.slow
def test_the_chunks_are_of_the_same_pairs_and_the_end_is_said(finished: StagedSummary) -> None:
    first, second = digests(finished.folder)
    assert (first["before"], first["after"], second["after"]) == (21, 10, 11)
    assert first["from_sha256"] == second["from_sha256"]
    assert "the adapter to use is that of the last one" in str(finished)
    assert str(finished.folder / "stage-2" / "adapter") in str(finished)


@pytest.mark.slow
def test_scores_of_a_finished_stage_select_pairs(root: Path, finished: StagedSummary, tmp_path: Path) -> None:
    """As SeRA and the paper of the reference gap do: what `score` writes, `select` reads, digests and all."""
    scores = tmp_path / "scores.jsonl"
    report = score_file(finished.folder / "stage-1" / "adapter", root / "train.jsonl", out=scores)
    best = sorted(report.scores, key=lambda score: -(score.margin or 0))[:5]
    assert all(score.digest for score in best)
    select = {"select": {"by": "margin", "keep": 5, "scores": str(scores)}}
    data = Data(train=[{"path": str(root / "train.jsonl")}], steps=[select], cache=False)
    kept = prepare_data(data, toy_tokenizer())["train"].tokens.pairs
    assert {pair.id for pair in kept} == {score.id for score in best}


@pytest.mark.slow
def test_a_stage_that_was_stopped_goes_on_where_it_was(
    root: Path, finished: StagedSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, config = root / "stopped", staged(root)
    original, begun = FocalPOTrainer.training_step, [0]

    def step_and_signal(self: FocalPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        begun[0] += 1
        if begun[0] == 3:  # the first step of the second stage
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(FocalPOTrainer, "training_step", step_and_signal)
        stopped = train_stages(config, quiet=True, runs_dir=runs)
    assert (stopped.number, stopped.interrupted_by) == (2, signal.SIGTERM)
    assert str(stopped).startswith("stage 2 of 2: stopped and saved after step 1 of 2")
    written = (runs / "staged" / "stage-1" / ADAPTER).stat().st_mtime_ns
    with pytest.raises(InputError, match="already holds a run of several stages: go on by --resume"):
        train_stages(config, quiet=True, runs_dir=runs)
    faster = staged(root, training=config.training.model_dump(mode="json") | {"learning_rate": 0.02})
    with pytest.raises(InputError, match=r"training\.learning_rate: 0\.01 -> 0\.02"):
        train_stages(faster, resume=True, quiet=True, runs_dir=runs)
    with pytest.raises(InputError, match="holds a run of several stages"):
        train(run_config(root).model_copy(update={"name": "staged"}), quiet=True, runs_dir=runs)
    done = train_stages(config, resume=True, quiet=True, runs_dir=runs)
    assert done.interrupted_by is None
    assert (runs / "staged" / "stage-1" / ADAPTER).stat().st_mtime_ns == written
    for number in (1, 2):
        ours, theirs = (load_file(place / f"stage-{number}" / ADAPTER) for place in (done.folder, finished.folder))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_a_stage_stops_before_the_next(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun = FocalPOTrainer.training_step, [0]

    def step_and_signal(self: FocalPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        begun[0] += 1
        if begun[0] == 2:  # of two
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(FocalPOTrainer, "training_step", step_and_signal)
        stopped = train_stages(staged(root), quiet=True, runs_dir=tmp_path)
    assert (stopped.number, stopped.interrupted_by, begun) == (1, signal.SIGTERM, [2])
    assert (tmp_path / "staged" / "stage-1" / ADAPTER).exists()
    done = train_stages(staged(root), resume=True, quiet=True, runs_dir=tmp_path)
    assert (done.number, done.interrupted_by) == (2, None)


@pytest.mark.row("55")
@pytest.mark.slow
def test_other_pairs_than_those_of_the_first_stage_are_refused(root: Path, tmp_path: Path) -> None:
    data = staged(root).data.model_dump(mode="json")
    file = tmp_path / "train.jsonl"
    file.write_text((root / "train.jsonl").read_text())
    config = staged(root, data=data | {"train": [{"path": str(file)}]})
    folder = tmp_path / "runs" / "staged"
    first = next(iter(stage_configs(config, folder)))
    train(first, quiet=True, runs_dir=folder)
    (folder / "stages.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"the training pairs are others than those of .*stage-1"):
        train_stages(config, resume=True, quiet=True, runs_dir=tmp_path / "runs")


def test_stages_of_an_order_are_its_chunks(root: Path) -> None:
    order = {"order": {"by": "length_gap", "first": "lowest"}}
    config = staged(root, data=staged(root).data.model_dump(mode="json") | {"steps": [order]}, stages=3)
    last = [*stage_configs(config, Path("runs/staged"))][-1]
    assert last.data.steps is not None
    assert [step.name for step in last.data.steps] == ["order", "chunk"]
    assert last.adapter is not None
    assert last.adapter.start_from == "runs/staged/stage-2/adapter"


def test_at_full_parameters_the_model_before_is_both(root: Path) -> None:
    base = str(root / "base")
    config = staged(root, adapter=None, reference={"kind": "separate_model", "model": base})
    first, second = stage_configs(config, Path("runs/staged"))
    assert first.model.name == base
    assert second.reference is not None
    assert second.model.name == second.reference.model == "runs/staged/stage-1/model"


def test_a_refused_first_stage_leaves_the_name_free(root: Path, tmp_path: Path) -> None:
    order = {"order": {"by": "score_gap", "first": "lowest"}}  # the toy rows have no scores
    config = staged(root, data=staged(root).data.model_dump(mode="json") | {"steps": [order]})
    for _ in range(2):
        with pytest.raises(InputError, match="score_gap needs both scores of every pair"):
            train_stages(config, quiet=True, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_one_run_is_one_stage(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one run is one stage"):
        train(staged(root), quiet=True, runs_dir=tmp_path)
    with pytest.raises(InputError, match="holds no stages to resume"):
        train_stages(staged(root), resume=True, quiet=True, runs_dir=tmp_path)
