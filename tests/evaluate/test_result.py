"""Results as files: the same bytes, read back equal; what is not one is refused by file and key."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions, prompt_sha256, read_result

RESULT = Result(
    benchmark="alpaca_eval_2",
    model="mine",
    scores={"win_rate": Score(21.5, 19.0, 24.0, 1.3), "margin": Score(0.0123)},
    judge="some-judge",
    sampling={"temperature": 0.9},
    counts={"prompts": 2, "malformed": 1},
    settings={"annotator": "x"},
    inputs={"mine.json": "0" * 64},
    versions={"lorafocal": "1"},
    notes=("another judge than the paper's",),
    items=({"prompt_sha256": prompt_sha256("a"), "preference": 1.0}, {"prompt_sha256": "b", "preference": None}),
    details={"bins": [{"low": 0.5, "pairs": 3}, {"low": 0.75, "pairs": 1}]},
)


def test_a_result_reads_back_equal_and_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    RESULT.write(first)
    read_result(first).write(second)
    assert read_result(first) == RESULT
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_the_table_has_every_number_and_every_note() -> None:
    table = RESULT.table()
    for text in ("alpaca_eval_2", "some-judge", "21.50 [19.00, 24.00]", "0.0123", "malformed", "bins:", "0.75"):
        assert text in table
    assert table.endswith("note: another judge than the paper's")
    assert str(Score(50.0, standard_error=1.5)) == "50.00 (standard error 1.50)"


@pytest.mark.parametrize("number", [math.nan, math.inf, True, "7"])
def test_a_score_is_a_finite_number(number: float) -> None:
    with pytest.raises(InputError, match="finite number"):
        Score(number)
    with pytest.raises(InputError, match="high"):
        Score(1.0, 0.0, high=number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2"),
        ({"benchmark": "vibes"}, "benchmark is one of"),
        ({"scores": {"win_rate": {"value": None}}}, "value is a finite number"),
        ({"scores": {"win_rate": {"worth": 1}}}, "worth"),
        ({"scores": {"win_rate": 7}}, "scores.win_rate is no score"),
        ({"items": [7]}, r"items\[0\] is a int"),
        ({"settings": []}, "settings is a list"),
        ({"details": {"bins": [7]}}, r"bins\[0\] is a int"),
    ],
)
def test_what_is_no_result_is_refused_by_file_and_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT.as_dict() | change))
    with pytest.raises(InputError, match=rf"result\.json.*{message}"):
        read_result(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_result(path)
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no key benchmark"),
        ('{"benchmark": "rule"}', "format is None"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_result(path)
    path.write_text(json.dumps({key: value for key, value in RESULT.as_dict().items() if key != "notes"}))
    with pytest.raises(InputError, match="has no notes"):
        read_result(path)


def test_no_place_on_this_machine_is_written(tmp_path: Path) -> None:
    placed = Result("rule", "mine", {}, settings={"targets": [str(tmp_path)]})
    with pytest.raises(InputError, match="no place on this machine"):
        placed.write(tmp_path / "result.json")
    with pytest.raises(InputError, match="does not exist"):
        RESULT.write(tmp_path / "missing" / "result.json")
    assert not list(tmp_path.iterdir())
    Result("rule", "mine", {}, settings={"pattern": "/no/such/place"}).write(tmp_path / "result.json")


def test_inputs_are_named_without_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(name)
    hashes = file_hashes(tmp_path / "a" / "x.json", tmp_path / "b" / "x.json")
    assert hashes == {"x.json": prompt_sha256("a"), "x.json (2)": prompt_sha256("b")}
    assert set(package_versions("torch", "no-such-package")) == {"lorafocal", "torch"}
