"""The table of an evaluation: what is written is read back, and resuming forgets what never happened."""

from __future__ import annotations

import json
import math

import pytest

from lorafocal.errors import InputError
from lorafocal.evaluations import (
    EvaluatedPair,
    drop_later,
    evaluation_file,
    evaluation_files,
    read_evaluation,
    write_evaluation,
)

ROWS = [EvaluatedPair("b", -0.1 - 0.2, -2.0, -math.pi, -4.0), EvaluatedPair("a\u2028é", -1e-30, -3e8, -1.0, 0.0)]


def test_rows_come_back_to_the_same_bits_in_their_order(tmp_path):
    path = evaluation_file(tmp_path, 7)
    write_evaluation(path, ROWS)
    assert path == tmp_path / "evaluations" / "step-7.jsonl"
    assert read_evaluation(path) == ROWS
    assert list(json.loads(path.read_text().splitlines()[0])) == [
        "id", "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected",
    ]  # fmt: skip


def test_files_are_found_by_step_in_order_and_strangers_are_not(tmp_path):
    assert evaluation_files(tmp_path) == {}
    for step in (10, 9, 200):
        write_evaluation(evaluation_file(tmp_path, step), ROWS)
    (tmp_path / "evaluations" / "step-x.jsonl").touch()
    assert list(evaluation_files(tmp_path)) == [9, 10, 200]


@pytest.mark.parametrize(("step", "left"), [(0, []), (5, [3, 5]), (9, [3, 5, 8])])
def test_going_back_to_a_step_forgets_later_evaluations(tmp_path, step, left):
    for at in (3, 5, 8):
        write_evaluation(evaluation_file(tmp_path, at), ROWS)
    drop_later(tmp_path, step)
    assert list(evaluation_files(tmp_path)) == left


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "step-1.jsonl"
    with pytest.raises(InputError, match=r"step-1\.jsonl cannot be read"):
        read_evaluation(path)
    write_evaluation(path, ROWS)
    path.write_text(path.read_text() + '{"id": "c"}\n')
    with pytest.raises(InputError, match=r"step-1\.jsonl:3 .*policy_chosen"):
        read_evaluation(path)
