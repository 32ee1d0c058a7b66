"""The README's first command, in small: every line of it runs, and what it names is there."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from lorafocal.model.toy_base import ToyRecipe, toy_base

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "01_quickstart.py"


def test_the_quickstart_trains_evaluates_exports_and_reports(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = ["focalpo-1", "dpo-1"]
    small = {"SEEDS": (1,), "RUNS": runs, "OURS": (*script.OURS[:5], *runs), "TRAINING_PAIRS": 192, "HELD_OUT": 24}
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    quick = partial(toy_base, tmp_path / "cache", recipe=ToyRecipe(steps=3))
    monkeypatch.setattr(script, "toy_base", quick)
    out = tmp_path / "quickstart"
    script.main(out, ["training.eval_steps=2", "training.save_steps=2", "packing.tokens=2048"])
    shown = capsys.readouterr().out
    for name in ("base", *runs):
        assert f"\n{name} " in shown
        assert (out / "results" / f"{name}-rule.json").is_file()
    for made in ("bundle/verify.py", "bundle/merged", "focalpo-1/adapter", "focalpo-1/config.yaml"):
        assert (out / made).exists()
    assert "eval_right_answers" in (out / "focalpo-1" / "metrics.jsonl").read_text(encoding="utf-8")
    script.make_room(out)  # a second call starts over, and leaves what is not its own
    assert not (out / "focalpo-1").exists()
