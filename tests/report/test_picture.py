"""The picture is drawn from metrics files, without a display."""

from __future__ import annotations

import json

import pytest

from lorafocal.errors import InputError
from lorafocal.report.picture import PANELS, draw_runs, training_lines

LINE = {key: 0.5 for *_, keys in PANELS for key in keys}


def test_every_panel_shows_every_run(tmp_path):
    for name in ("a", "b"):
        lines = [{**LINE, "step": step} for step in (1, 2, 3)] + [
            {"eval_loss": 0.6, "step": 3},
            {"train_loss": 1, "step": 3},
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in training_lines(tmp_path / "a")] == [1, 2, 3]
    picture = draw_runs({"FocalPO": tmp_path / "a", "DPO": tmp_path / "b"}, tmp_path / "new" / "runs.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        draw_runs({"a": tmp_path / "none.jsonl"}, tmp_path / "x.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no training step"):
        draw_runs({"a": tmp_path / "empty.jsonl"}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
