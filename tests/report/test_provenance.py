"""What a report says of recipe, deviations and inputs, and that it trusts no manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.report.page import page
from lorafocal.report.provenance import as_dict, deviations, lines, made_of
from lorafocal.report.read import RunRecord, read_run
from tests.written_run import write_run

OTHER = {"key": "training.learning_rate", "recipe": 5e-7, "here": 1e-6, "mark": "paper: Appendix C"}
MOVED = {
    "key": "data.train",
    "recipe": [{"path": "a/b"}],
    "here": [{"path": "/home/me/x.jsonl"}],
    "mark": "paper: data",
}


def record(tmp_path: Path, **sections: Any) -> RunRecord:
    folder = write_run(tmp_path / "run", lines=[{"step": 1, "loss": 0.5}], tables={})
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sections))
    return read_run(folder, "run")


@pytest.mark.row("58")
def test_deviations_are_listed_with_where_the_recipes_value_is_from(tmp_path: Path) -> None:
    found = record(tmp_path, recipe={"name": "mistral-7b-focalpo", "deviations": [OTHER, MOVED]})
    assert lines(found) == [
        "recipe mistral-7b-focalpo, but for 2 values",
        "  training.learning_rate: 5e-07 -> 1e-06 (the recipe's is paper: Appendix C)",
        '  data.train: [{"path": "a/b"}] -> [{"path": "…/x.jsonl"}] (the recipe\'s is paper: data)',
    ]
    shown = page([found], [], [])
    assert "against the recipe mistral-7b-focalpo" in shown
    assert "<td>5e-07</td><td>1e-06</td><td>paper: Appendix C</td>" in shown
    assert "/home/me" not in shown + json.dumps(as_dict(found))


def test_a_run_that_follows_its_recipe_says_so(tmp_path: Path) -> None:
    found = record(tmp_path, recipe={"name": "mistral-7b-dpo", "deviations": "exact"})
    assert lines(found) == ["recipe mistral-7b-dpo, exact"]
    assert as_dict(found) == {"name": "mistral-7b-dpo", "deviations": []}
    assert "Exactly as the recipe says: run." in page([found], [], [])


def test_a_run_without_a_recipe_shows_what_it_was_made_of(tmp_path: Path) -> None:
    found = record(
        tmp_path,
        recipe=None,
        effective_batch={"pairs": 128, "pairs_per_process": 16},
        processes=8,
        engine={"kind": "zero3", "offload": "none"},
        seeds={"adapter": 42, "order": 43},
        chat_template_sha256="c" * 64,
    )
    assert (lines(found), deviations(found), as_dict(found)) == ([], [], None)
    assert made_of(found) == {
        "base": f"base, sha256 {'b' * 16}",
        "chat template, sha256": "c" * 16,
        "tokens of train, sha256": "t" * 16,
        "tokens of eval, sha256": "e" * 16,
        "pairs of a step": "128",
        "of them in a process": "16",
        "processes": "8",
        "engine": "zero3",
        "seeds": "adapter 42, order 43",
    }
    assert "What it was made of" in page([found], [], [])


@pytest.mark.parametrize(
    "recipe", [3, "x", [], {"name": 3}, {"name": "x", "deviations": 3}, {"name": "x", "deviations": [3]}]
)
def test_a_manifest_of_another_shape_stops_no_report(tmp_path: Path, recipe: Any) -> None:
    found = record(tmp_path, recipe=recipe, data=3, seeds=[], engine="zero3", effective_batch=None, base="x")
    lines(found), made_of(found), page([found], [], [])


def test_text_of_a_manifest_is_escaped(tmp_path: Path) -> None:
    found = record(tmp_path, recipe={"name": "<b>", "deviations": [OTHER | {"here": "<script>"}]})
    assert "<script>" not in page([found], [], [])
    assert "<b>" not in page([found], [], [])
