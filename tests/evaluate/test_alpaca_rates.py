"""AlpacaEval's numbers from judgments that exist: the package's own, by position, in every spelling of a preference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pandas
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate import alpaca_rows
from lorafocal.evaluate.alpaca import evaluate_annotations
from lorafocal.evaluate.alpaca_package import alpaca_eval, length_controlled
from lorafocal.evaluate.alpaca_rows import order_of, prompts_digest
from lorafocal.evaluate.result import prompt_sha256
from tests.alpaca_files import (
    COUNT,
    PREFERENCES,
    PROMPTS,
    SHUFFLED,
    evaluate,
    fair,
    gamed,
    judgments,
    numbers,
    sigmoid,
    write,
)
from tests.openai_server import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the answers of both models, where the hub's cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write(tmp_path / "ours.json", "ours")
    write(tmp_path / "theirs.json", "theirs")
    return tmp_path


# ---- the length control


def test_the_length_controlled_rate_is_the_packages(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = judgments(files / "a.json", PREFERENCES)
    result = evaluate_annotations(file, gamed=gamed(files / "g.csv"))
    with alpaca_eval() as package:
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(files / "g.csv"))
        rows = json.loads(file.read_text())
        expected = package.metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
    assert result.scores["length_controlled_win_rate"].value == pytest.approx(expected["length_controlled_winrate"])
    assert result.scores["win_rate"].value == pytest.approx(expected["win_rate"])
    assert result.scores["win_rate"].standard_error == pytest.approx(expected["standard_error"])
    assert result.settings["length_control"] == "length_controlled_v1"
    assert result.inputs.keys() == {"a.json", "g.csv"}


def test_a_model_that_wins_by_length_alone_comes_to_a_half(files: Path) -> None:
    words = [2 * (n % 5) + 4 for n in range(COUNT)]
    rows = pandas.DataFrame(
        {
            "preference": [1 + sigmoid(3 * math.tanh(length / 3)) for length in words],
            "output_1": "x",
            "output_2": ["x" * (1 + length) for length in words],
            "generator_1": "theirs",
            "generator_2": "ours",
        }
    )
    raw = 100 * (rows["preference"].mean() - 1)
    assert raw > 85
    assert abs(length_controlled(rows, gamed(files / "g.csv")) - 50) < abs(raw - 50) / 2


@pytest.mark.row("58")
def test_the_order_of_the_rows_does_not_matter_where_a_reference_tells_the_positions(files: Path) -> None:
    table = gamed(files / "g.csv")
    expected = numbers(evaluate_annotations(judgments(files / "a.json", PREFERENCES), gamed=table))
    shuffled = judgments(files / "b.json", PREFERENCES, SHUFFLED)
    found = evaluate_annotations(shuffled, reference=files / "theirs.json", gamed=table)
    assert numbers(found) == pytest.approx(expected, abs=1e-9)
    in_file_order = numbers(evaluate_annotations(shuffled, gamed=table))
    assert abs(in_file_order["length_controlled_win_rate"] - expected["length_controlled_win_rate"]) > 0.01


def test_answers_in_another_order_are_judged_to_the_same_numbers(files: Path) -> None:
    table = gamed(files / "g.csv")
    with serving(fair) as server:
        expected = numbers(evaluate(files, server, gamed=table))
        write(files / "ours.json", "ours", SHUFFLED)
        assert numbers(evaluate(files, server, gamed=table)) == pytest.approx(expected, abs=1e-9)
        assert len(server.requests) == COUNT
    assert "length_controlled_win_rate" in expected


def test_the_file_in_the_hubs_cache_is_used(files: Path) -> None:
    file = judgments(files / "a.json", PREFERENCES)
    without = evaluate_annotations(file)
    assert "length_controlled_win_rate" not in without.scores
    assert any("hf download tatsu-lab/alpaca_eval df_gamed.csv" in note for note in without.notes)
    snapshot = files / "hub" / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    gamed(snapshot / "df_gamed.csv")
    given = evaluate_annotations(file, gamed=gamed(files / "g.csv"))
    assert evaluate_annotations(file).scores == given.scores
    gamed(snapshot / "df_gamed.csv", COUNT + 1)
    assert any("of 25 prompts by their position, and there are 24" in note for note in evaluate_annotations(file).notes)


GAMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, r"cannot be read \(No such file or directory\): `hf download"),
    "empty": (lambda path: path.write_text(""), "cannot be read as df_gamed.csv"),
    "a column less": (lambda path: path.write_text("model,index\na,0\n"), "no column preference"),
    "words": (lambda path: gamed(path, preference="high"), "column preference holds values of another kind"),
    "no flags": (lambda path: gamed(path, not_gamed_baseline=3), "column not_gamed_baseline"),
    "fewer prompts": (lambda path: gamed(path, 20), "of 20 prompts by their position, and there are 24"),
}


@pytest.mark.parametrize("case", GAMED)
def test_a_given_file_that_does_not_serve_is_refused_before_anything_is_sent(files: Path, case: str) -> None:
    make, message = GAMED[case]
    make(files / "g.csv")
    with serving(fair) as server, pytest.raises(InputError, match=message):
        evaluate(files, server, gamed=files / "g.csv")
    assert server.requests == []


def test_alpaca_evals_prompts_in_another_order_have_no_length_control(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [prompt_sha256(prompt) for prompt in PROMPTS]
    monkeypatch.setattr(alpaca_rows, "IN_ORDER", prompts_digest(hashes))
    monkeypatch.setattr(alpaca_rows, "IN_ANY_ORDER", prompts_digest(sorted(hashes)))
    assert order_of(PROMPTS) == "own"
    assert order_of(PROMPTS[1:]) == "not these prompts"
    file, table = judgments(files / "a.json", PREFERENCES, SHUFFLED), gamed(files / "g.csv")
    with pytest.raises(InputError, match="in another order than its own"):
        evaluate_annotations(file, gamed=table)
    assert not any("are not AlpacaEval's" in note for note in evaluate_annotations(file).notes)


# ---- annotations that exist


def test_old_and_missing_spellings_of_a_preference(files: Path) -> None:
    values: list[Any] = [2.0, 1.0, 0, 1.5, None, -1, float("nan"), *[1.0] * (COUNT - 7)]
    result = evaluate_annotations(judgments(files / "a.json", values), gamed=gamed(files / "g.csv"))
    assert 0 < result.scores["length_controlled_win_rate"].value < 50
    assert result.counts["prompts_without_verdict"] == 3
    assert result.counts["draws"] == 2
    assert result.scores["win_rate"].value == pytest.approx(100 * 2 / (COUNT - 3))
    assert result.judge == "gpt-4-1106-preview"
    assert any("order bias is not known" in note for note in result.notes)


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a word": ({"preference": "2"}, "row 1, key `preference`"),
    "too high": ({"preference": 2.5}, "row 1, key `preference`"),
    "a flag": ({"preference": True}, "row 1, key `preference`"),
    "no text": ({"output_2": 3}, "row 1, key `output_2`"),
    "one prompt": ({"instruction": "same"}, "row 2, key `instruction`: an earlier row judges this prompt"),
    "itself": ({"generator_1": "ours"}, "are one model, 'ours'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_annotations_that_are_none_are_refused_by_row_and_key(files: Path, case: str) -> None:
    fields, message = ROWS[case]
    with pytest.raises(InputError, match=message):
        evaluate_annotations(judgments(files / "a.json", PREFERENCES, **fields))


@pytest.mark.parametrize("key", ["instruction", "output_1", "generator_2", "annotator", "preference"])
def test_a_key_that_is_missing_is_named(files: Path, key: str) -> None:
    rows = json.loads(judgments(files / "a.json", PREFERENCES).read_text())
    del rows[4][key]
    (files / "a.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"a.json, row 5, key `{key}`: missing"):
        evaluate_annotations(files / "a.json")
