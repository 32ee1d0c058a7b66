"""The example of label errors, on a base that knows nothing: every run, list and number is there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

import lorafocal.model.toy_base
from tests.saved_run import save_base

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "07_label_errors.py"


@pytest.mark.slow
def test_07_finds_pairs_leaves_them_out_and_trains_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    monkeypatch.setattr(lorafocal.model.toy_base, "toy_base", lambda: base)
    sizes = ["--pairs", "40", "--held-out", "4", "--out", str(tmp_path / "out")]
    settings = ["model.shape=null", "training.pairs_per_step=8", "training.save_steps=2", "training.eval_steps=5"]
    monkeypatch.setattr("sys.argv", [EXAMPLE.name, *sizes, "--set", *settings])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    said = json.loads(line)
    assert set(said["lists"]) == {"confident", "all"}
    assert all(0 <= share <= 1 for shares in said["held out"].values() for share in shares.values())
    pairs = {
        path.name: json.loads((path / "manifest.json").read_text())["data"]["train"]["pairs"]
        for path in (tmp_path / "out" / "seed-0").iterdir()
        if path.is_dir()
    }
    assert pairs["all"] == 40
    assert pairs["without-swapped"] == 36
    assert pairs["without-suspects"] == 40 - said["lists"]["all"]["pairs"]
    assert pairs["without-random"] == 40 - said["lists"]["confident"]["pairs"]
