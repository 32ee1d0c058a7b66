"""Suspects of a real small run: margins are those of `score`, at each state; ids lead to a run without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lorafocal.config import check_config
from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.data.messages import as_text
from lorafocal.data.prepare import prepare_data
from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate.score import score_file
from lorafocal.evaluate.suspects import _place_of_reference, find_suspects, margins_of
from lorafocal.evaluate.suspicion import Suspects
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.run import train
from tests.tiny import pairs
from tests.toy_run import run_config, write_inputs

SLIP = [{"role": "assistant", "content": "9 9 9"}]  # always the worse one, but where a pair is swapped
SWAPPED = {"toy-0", "toy-6", "toy-12"}


def swap(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps that keeps checkpoints 2, 4, 6 and 8; one source counts twice."""
    root = write_inputs(tmp_path_factory.mktemp("suspects"))
    rows = [json.loads(line) | {"rejected": SLIP} for line in (root / "train.jsonl").read_text().splitlines()]
    rows[:18] = [swap(row) if n % 6 == 0 else row for n, row in enumerate(rows[:18])]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:18]))
    doubled = [{"path": str(root / "train.jsonl"), "weight": 2.0}]
    changes: dict[str, Any] = {
        "data__train": doubled,
        "training__learning_rate": 1e-3,
        "training__num_train_epochs": None,
    }
    train(run_config(root, **changes, training__max_steps=9), quiet=True, runs_dir=root)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Suspects:
    return find_suspects(root / "toy", out=root / "page.html", write=root / "suspects.txt")


def margins_by_id(target: Path, rows: Path) -> dict[str, float]:
    return {score.id: score.margin for score in score_file(target, rows).scores if score.margin is not None}


@pytest.mark.row("53")
def test_margins_are_those_of_score_at_every_state(root: Path, found: Suspects) -> None:
    assert found.steps == (2, 4, 6, 8, 9)
    assert found.pairs == 18  # a copy of a pair is no second pair
    folders = [*(root / "toy" / f"checkpoint-{step}" / "adapter" for step in (2, 4, 6, 8)), root / "toy" / "adapter"]
    expected = [margins_by_id(folder, root / "train.jsonl") for folder in folders]
    wrong = [name for name in expected[0] if all(state[name] < 0 for state in expected)]
    assert {suspect.id for suspect in found.found} == set(wrong)
    assert len(SWAPPED & set(wrong)) >= 2
    assert found.right == sum(all(state[name] > 0 for state in expected) for name in expected[0])
    for suspect in found.found:
        assert suspect.margins == pytest.approx([state[suspect.id] for state in expected], abs=1e-5)
    assert len({suspect.margins for suspect in found.found}) == len(wrong) > 0
    assert [s.suspicion for s in found.found] == sorted((s.suspicion for s in found.found), reverse=True)


def test_the_references_lead_is_its_own_ranking(root: Path, found: Suspects) -> None:
    scores = {score.id: score for score in score_file(root / "toy" / "adapter", root / "train.jsonl").scores}
    for suspect in found.found:
        score = scores[suspect.id]
        assert score.reference_chosen_logps is not None
        assert score.reference_rejected_logps is not None
        lead = score.reference_chosen_logps - score.reference_rejected_logps
        assert suspect.reference_lead == pytest.approx(lead, abs=1e-4)
        assert (suspect.chosen_tokens, suspect.rejected_tokens) == (score.chosen_tokens, score.rejected_tokens)


def test_what_is_written_leaves_exactly_those_pairs_out_of_the_next_run(root: Path, found: Suspects) -> None:
    every = root / "every.txt"
    every.write_text("".join(f"{suspect.line}\n" for suspect in found.found))
    config = run_config(root, data__leave_out=str(every), data__cache=False)
    part = prepare_data(config.data, toy_tokenizer())["train"]
    rows = [json.loads(line)["id"] for line in (root / "train.jsonl").read_text().splitlines()]
    assert [pair.id for pair in part.tokens.pairs] == [r for r in rows if r not in {s.id for s in found.found}]
    assert [(drop.reason, drop.count) for drop in part.drops] == [("in_leave_out", len(found.found))]
    written = [line.partition("\t")[0] for line in (root / "suspects.txt").read_text().splitlines()]
    assert written == [suspect.id for suspect in found.found if suspect.confident]


def test_a_file_of_other_pairs_and_a_limit(root: Path, found: Suspects) -> None:
    other = find_suspects(root / "toy", pairs=root / "train.jsonl", limit=1)
    assert other.of == "train.jsonl"
    assert other.always_wrong == found.always_wrong
    assert [s.id for s in other.found] == [found.found[0].id]
    assert other.found[0].margins == pytest.approx(found.found[0].margins, abs=1e-5)


def test_changed_data_and_lost_checkpoints_are_said(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "toy"
    shutil.copytree(root / "toy", run, ignore=shutil.ignore_patterns("checkpoint-*"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["train"]["tokens_sha256"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    notes = find_suspects(run).notes
    assert "they have changed since" in notes[0]
    assert "one state only" in notes[1]


def test_what_cannot_be_scored_is_refused_before_weights_are_loaded(root: Path, tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"run": tmp_path}, "is no run folder"),
        ({"pairs": root / "toy" / HELD_OUT_FILE}, "holds token ids; .* give preference rows"),
        ({"out": tmp_path / "page.htm"}, "one .html file"),
        ({"write": tmp_path / "no" / "list.txt"}, "does not exist. Make it first"),
        ({"out": tmp_path / "page.html", "write": tmp_path / "page.html"}, "cannot be both the page and the list"),
        ({"limit": 0}, "limit is 0"),
    ]
    for given, message in refusals:
        with pytest.raises(InputError, match=message):
            find_suspects(**({"run": root / "toy"} | given))
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(root / "toy" / "config.yaml", begun)
    with pytest.raises(InputError, match="no adapter, no model and no complete checkpoint"):
        find_suspects(begun)


def test_an_objective_whose_ranking_only_the_run_could_tell_is_refused(root: Path, tmp_path: Path) -> None:
    run = shutil.copytree(root / "toy", tmp_path / "weighing")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"objective": {"name": "bmc", "beta": 0.1}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"bmc ranks answers by weights of single tokens, .*short run of dpo"):
        find_suspects(run)


def test_margins_are_the_objectives_own_without_its_target() -> None:
    some = pairs(6)
    lengths = torch.tensor([*(len(p.chosen_ids) for p in some), *(len(p.rejected_ids) for p in some)])
    policy = PairLogps(*torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).mul(9).unbind())
    reference = PairLogps(*torch.randn(2, 6, generator=torch.Generator().manual_seed(4)).mul(9).unbind())
    own = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    for name in ("dpo", "focalpo", "kto", "cdpo", "odpo", "wpo"):
        margins = margins_of(build_objective(name, beta=0.3), some, policy, reference)
        assert margins.tolist() == pytest.approx((0.3 * own).tolist(), rel=1e-5)
    mean = policy.chosen / lengths[:6] - policy.rejected / lengths[6:]
    for ratio in (0.0, 2.0):
        simpo = build_objective("simpo", beta=2.0, gamma_beta_ratio=ratio)
        assert margins_of(simpo, some, policy, None).tolist() == pytest.approx((2 * mean).tolist(), rel=1e-5)


def test_the_reference_is_found_where_the_run_had_it(root: Path) -> None:
    def place(kind: str, adapter: dict[str, Any] | None = None, **reference: Any) -> str | None:
        values = run_config(root).model_dump(mode="json") | {"reference": {"kind": kind, **reference}}
        return _place_of_reference(check_config(values | ({"adapter": adapter} if adapter else {})))

    assert place("disabled_adapter") is None
    assert place("cached") is None
    assert place("separate_model", model="other") == "other"
    assert place("cached", model="other") == "other"
    assert place("frozen_copy", {"start_from": "runs/first/adapter"}) == "runs/first/adapter"
    with pytest.raises(InputError, match="owner/name at a commit: name its weights by --reference"):
        place("separate_model", model="owner/name", revision="0" * 40)


def test_several_messages_are_told_apart() -> None:
    assert as_text("plain") == "plain"
    assert as_text([{"role": "user", "content": "one"}]) == "one"
    two = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"}]
    assert as_text(two) == "system: be kind\n\nuser: one"
