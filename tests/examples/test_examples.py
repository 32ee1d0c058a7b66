"""The example scripts, each run as a person would run it, on a tiny model saved in a folder."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from lorafocal.data.toy import toy_preferences
from tests.saved_run import save_base
from tests.toy_run import metric_lines

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `pairs.jsonl`, 60 conversational rows."""
    folder = tmp_path_factory.mktemp("inputs")
    save_base(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_preferences(60, seed=1)))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, script: str, inputs: Path, out: Path, *more: str) -> None:
    """The script with the three arguments that all have, and more."""
    given = ["--model", str(inputs / "base"), "--data", str(inputs / "pairs.jsonl"), "--out", str(out), *more]
    monkeypatch.setattr("sys.argv", [script, *given])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.slow
def test_02_trains_scores_and_merges(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ("--dtype", "float32", "--learning-rate", "3e-2", "--pairs-per-step", "8")
    run(monkeypatch, "02_lora_single_gpu.py", inputs, tmp_path, *fast)
    printed = capsys.readouterr().out
    assert "steps done" in printed
    assert "held out" in printed
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 3  # a twentieth of 60
    assert {"margin", "policy_chosen"} & scores[0].keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_02_says_what_is_wrong(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"02_lora_single_gpu: data\.train: .* does not exist"):
        run(monkeypatch, "02_lora_single_gpu.py", inputs, tmp_path, "--data", "nowhere.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.newest
def test_06_trains_by_both_trainers_from_one_config(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "06_from_trl.py", inputs, tmp_path / "ours", "--learning-rate", "1e-2")
    run(monkeypatch, "06_from_trl.py", inputs, tmp_path / "theirs", "--learning-rate", "1e-2", "--trl")
    ours = PeftConfig.from_pretrained(tmp_path / "ours" / "adapter")
    theirs = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert (ours.r, ours.target_modules) == (theirs.r, theirs.target_modules)
    last = metric_lines(tmp_path / "ours")[-1]
    assert last["step"] == 4  # 60 pairs, 16 a step
    assert last["rewards/margins"] > 0
    assert torch.isfinite(torch.tensor(last["loss"]))
