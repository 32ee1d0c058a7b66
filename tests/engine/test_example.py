"""examples/04_full_parameter.py as a person would start it, on two processes of a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lorafocal.data.toy import toy_preferences
from tests.engine import launches
from tests.saved_run import save_base

pytestmark = pytest.mark.engine

SCRIPT = str(launches.REPOSITORY / "examples/04_full_parameter.py")


def test_04_stores_the_reference_trains_every_parameter_and_leaves_a_model(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_preferences(60, seed=1)))
    given = [
        "--model",
        str(tmp_path / "base"),
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--out",
        str(tmp_path / "mine"),
    ]
    fast = ["--dtype", "float32", "--learning-rate", "1e-3", "--pairs-per-step", "16", "--engine", "fsdp2", "--cpu"]
    code, output = launches.run([*launches.TORCHRUN, SCRIPT, *given, *fast], cwd=str(tmp_path))
    assert code == 0, output
    assert output.count("4 steps done; the model is in") == 1
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "mine/run/model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    moved = [not a.equal(b) for a, b in zip(trained.parameters(), base.parameters(), strict=True)]
    assert all(moved)
    wrong = [*launches.TORCHRUN, SCRIPT, *given, "--cpu", "--data", "nowhere.jsonl", "--out", str(tmp_path / "other")]
    code, output = launches.run(wrong, cwd=str(tmp_path))
    assert code == 1  # the launcher's
    assert "04_full_parameter: data.train: " in output
    assert not (tmp_path / "other/run").exists()
