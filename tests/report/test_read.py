"""What a run folder holds becomes a record; what is wrong becomes one message, what is missing a note."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorafocal.errors import InputError
from lorafocal.report.read import read_run, read_runs
from tests.written_run import evaluation_line, pairs, training_line, write_run


def test_a_whole_run_is_read_without_a_note(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "a"), "a")
    assert record.series("loss").steps == [1, 10]
    assert record.series("eval_loss").values == [0.6, 0.6]
    assert (record.beta, record.objective.parameters["gamma"]) == (0.1, 0.05)
    assert [table.step for table in record.tables] == [1, 10]
    assert record.tables[0].policy.chosen.tolist() == [-8.8, -8.8]
    assert record.notes == []


def test_steps_are_ordered_and_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    lines = [training_line(4), {"eval_right_answers": 0.1, "step": 4}, {"eval_right_answers": 0.5, "step": 0}]
    lines.append({"eval_right_answers": 0.2, "step": 4})
    record = read_run(write_run(tmp_path / "a", lines), "a")
    assert record.series("eval_right_answers") == ([0, 4], [0.5, 0.2])


def test_null_and_what_fits_no_float_are_not_numbers(tmp_path: Path) -> None:
    lines = [training_line(1, loss=None, grad_norm=10**400, rewards__margins=math.inf, word="text", yes=True)]
    record = read_run(write_run(tmp_path / "a", lines), "a")
    assert all(math.isnan(record.lines[0][key]) for key in ("loss", "grad_norm", "rewards/margins"))
    assert not {"word", "yes"} & set(record.lines[0])
    assert record.series("loss").finite() == ([], [])


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.5, "ste')
    record = read_run(folder, "a")
    assert record.series("loss").steps == [1, 10]
    assert any("not whole" in note for note in record.notes)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{nothing", "is not JSON"),
        ("[1]", "no `step`"),
        ('{"loss": 1}', "no `step`"),
        ('{"loss": 1, "step": "3"}', "no `step`"),
        ('{"loss": 1, "step": NaN}', "no `step`"),
        ('{"loss": 1, "step": -1}', "no `step`"),
        ('{"loss": 1, "step": 1e300}', "no `step`"),
        ("\\xff\\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    folder = write_run(tmp_path / "a")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole.replace("\n", f"\n{line}\n", 1))
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2") as error:
        read_run(folder, "a")
    assert word in str(error.value)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a run folder"):
        read_runs([tmp_path / "none"])
    with pytest.raises(InputError, match="not a run folder"):
        read_runs([tmp_path / "file"])
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(InputError, match="no logged step yet"):
        read_runs([write_run(tmp_path / "young", [])])
    with pytest.raises(InputError, match="no run"):
        read_runs([])
    with pytest.raises(InputError, match="given twice"):
        read_runs([write_run(tmp_path / "a"), tmp_path / "a" / ".." / "a"])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / path) for path in ("x/a", "y/a", "b", "p/x/a")]
    assert [record.name for record in read_runs(folders)] == ["x/a (1)", "y/a", "b", "x/a (4)"]


def test_what_is_missing_is_said_and_the_rest_is_read(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "a", tables={}, finished=False, manifest=False), "a")
    notes = " ".join(record.notes)
    assert record.beta is None
    for words in ("no finished adapter", "stopped after step 10", "no manifest.json", "No evaluation left a table"):
        assert words in notes


def test_a_run_that_made_a_whole_model_is_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "adapter").rename(folder / "model")
    assert read_run(folder, "a").notes == read_run(write_run(tmp_path / "b"), "b").notes


def test_a_python_run_tells_beta_and_gamma_by_its_adapter(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", manifest=False)
    lineage = {
        "format": 1, "lorafocal": "0", "base": {"name": "b", "revision": None, "sha256": "0"}, "parents": [],
        "reference": None, "objective": {"name": "focalpo", "beta": 0.3, "gamma": 0.1}, "steps": 1, "pairs_seen": 1,
    }  # fmt: skip
    (folder / "adapter" / "lorafocal.json").write_text(json.dumps(lineage))
    assert read_run(folder, "a").objective.parameters == {"beta": 0.3, "gamma": 0.1}


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', "null"])
def test_a_broken_manifest_is_a_note(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "manifest.json").write_text(text)
    record = read_run(folder, "a")
    assert any("manifest.json cannot be read" in note for note in record.notes)
    assert any("beta is unknown" in note for note in record.notes)


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"id": "a"}\n', "[1]\n", '{"id": "a", "policy_chosen": "x", "policy_rejected": 1,'
     ' "reference_chosen": 1, "reference_rejected": 1}\n', "NaN\n"]
)  # fmt: skip
def test_a_broken_table_is_left_out_with_a_note(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "a", [training_line(3), evaluation_line(3)], {1: pairs()})
    (folder / "evaluations" / "step-3.jsonl").write_text(text)
    record = read_run(folder, "a")
    assert [table.step for table in record.tables] == [1]
    assert any("step-3.jsonl was left out" in note and str(tmp_path) not in note for note in record.notes)


def test_a_log_prob_that_is_not_finite_leaves_its_table_out(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "a", tables={1: pairs(chosen=[math.nan, 0.0])}), "a")
    assert record.tables == []


def test_a_sweep_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="is a sweep that has not ended: the same `lorafocal sweep` goes on with it"):
        read_runs([tmp_path])
    (tmp_path / "sweep.html").write_text("")
    with pytest.raises(InputError, match=r"is a sweep: its report is sweep\.html"):
        read_runs([tmp_path])
