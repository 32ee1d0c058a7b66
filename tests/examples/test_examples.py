"""The example scripts, each run as a person would run it, on a tiny model saved in a folder."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM

from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.evaluate.score import score_file
from lorafocal.model.shrunk import build, shrunk
from tests.openai_server import Said, serving
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


@pytest.fixture(scope="module")
def blocks_of_64(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """`base`, as wide as blocks of 4-bit weights are long, and the same pairs."""
    folder = tmp_path_factory.mktemp("blocks")
    tokenizer = toy_tokenizer()
    shape = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    small = shrunk(shape, tokens=len(tokenizer), eos=int(tokenizer.eos_token_id))
    build(small, dtype=torch.float32, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    shutil.copy(inputs / "pairs.jsonl", folder)
    return folder


@pytest.mark.slow
def test_03_trains_in_four_bits_and_merges_onto_what_it_trained_on(
    tmp_path: Path, blocks_of_64: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ("--dtype", "float32", "--learning-rate", "3e-2", "--pairs-per-step", "8", "--rank", "8")
    run(monkeypatch, "03_qlora_4bit.py", blocks_of_64, tmp_path, *fast)
    printed = capsys.readouterr().out
    assert "steps done" in printed
    lineage = json.loads((tmp_path / "run" / "adapter" / "lorafocal.json").read_text())
    assert lineage["quantization"] == "nf4"
    before = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    after = score_file(tmp_path / "merged", tmp_path / "run" / HELD_OUT_FILE).scores
    original = score_file(blocks_of_64 / "base", tmp_path / "run" / HELD_OUT_FILE).scores
    for row, merged, base in zip(before, after, original, strict=True):
        assert merged.chosen_logps == pytest.approx(row["chosen_logps"], abs=1e-3)
        assert abs(base.chosen_logps - row["reference_chosen_logps"]) > 1e-3  # 4 bits are another model


@pytest.mark.slow
def test_03_leaves_the_merge_to_another_machine(
    tmp_path: Path, blocks_of_64: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "03_qlora_4bit.py", blocks_of_64, tmp_path, "--no-merge", "--quantization", "int8", "--rank", "4")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "scores.jsonl"}


@pytest.mark.slow
def test_05_compares_two_models_by_a_rule_and_a_judge(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.jsonl").write_text("".join((inputs / "pairs.jsonl").read_text().splitlines(True)[:6]))
    other = save_base(tmp_path / "other", tied=True)
    given = ["--model", str(inputs / "base"), "--against", str(other), "--prompts", str(tmp_path / "few.jsonl")]
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with serving(lambda body: Said("m", [{"m": -0.7, "M": -0.7}])) as server:
        judging = ["--rule", "exact", "--judge", "made-up", "--server", server.url]
        monkeypatch.setattr("sys.argv", ["05", *given, "--tokens", "4", "--out", str(tmp_path / "out"), *judging])
        runpy.run_path(str(EXAMPLES / "05_evaluate.py"), run_name="__main__")
    assert "sign_test_p" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "model-judged.json").read_text())["scores"]["win_rate"]["value"] == 50
    assert (tmp_path / "out" / "answers.html").is_file()
    assert len(asked) == 1  # before anything was sent
    assert 1 <= len(server.requests) <= 6


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
