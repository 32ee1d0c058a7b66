"""Arena-Hard: verdicts with a known win rate, its intervals, and files of judgments."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.arena import evaluate_judgments
from lorafocal.evaluate.arena_prompt import LABEL_PATTERN
from lorafocal.evaluate.arena_verdicts import Verdicts, label_in, read_judgments
from lorafocal.evaluate.arena_win_rate import battles_resampled, questions_resampled
from lorafocal.evaluate.result import prompt_sha256, read_result

pytestmark = pytest.mark.slow

MIRROR = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B", None: None}

Labels = Sequence[tuple[str | None, str | None]]


def judgments(path: Path, labels: Labels, **fields: Any) -> Path:
    """A file as Arena-Hard writes it: for each question the labels of its two games."""
    rows = [
        {
            "question_id": f"q{number}",
            "model": "mine",
            "judge": "gpt-4-1106-preview",
            "games": [{"user_prompt": "u", "judgment": "j", "score": label} for label in pair],
        }
        | fields
        for number, pair in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def verdicts(labels: Labels) -> list[Verdicts]:
    return [Verdicts(f"q{number}", pair) for number, pair in enumerate(labels)]


def win_rate(labels: Labels) -> float:
    return battles_resampled(verdicts(labels), rounds=2, seed=0).value


def random_labels(count: int, seed: int = 0) -> list[tuple[str | None, str | None]]:
    known = list(MIRROR)
    rng = np.random.default_rng(seed)
    return [(known[first], known[second]) for first, second in rng.integers(len(known), size=(count, 2))]


# ---- the win rate


@pytest.mark.row("58")
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([("B>A", "A>B")], 100.0),  # the model is B first, and A then
        ([("A>B", "B>A")], 0.0),
        ([("A>B", "A>B")], 50.0),  # a judge that only sees places
        ([("A=B", "A=B")], 50.0),
        ([("B>A", "A=B")], 75.0),
        ([("B>>A", "B>A")], 75.0),  # three battles won, one lost
        ([("A>>B", "A>>B"), ("A=B", "A>B")], 100 * 4.5 / 8),
        ([("B>A", None)], 100.0),  # one order is missing: the other counts
        ([("B>A", None), (None, "B>>A"), (None, None)], 25.0),
        ([("A<B", "A>B"), ("B>A", "B=A"), ("A>B", "B>A")], 50.0),  # what is no label of Arena-Hard's is no verdict
    ],
)
def test_known_verdicts_have_the_known_win_rate(labels: Labels, expected: float) -> None:
    assert win_rate(labels) == pytest.approx(expected, abs=1e-3)


def test_the_other_side_has_the_rest_and_the_order_of_the_games_is_nothing() -> None:
    labels = random_labels(60)
    other = [(MIRROR[first], MIRROR[second]) for first, second in labels]
    turned = [(MIRROR[second], MIRROR[first]) for first, second in labels]

    assert win_rate(other) == pytest.approx(100 - win_rate(labels), abs=1e-3)
    assert win_rate(turned) == pytest.approx(win_rate(labels), abs=1e-3)


def test_the_interval_is_that_of_arena_hard() -> None:
    """Drawn as there, by pandas after numpy's seed 42, with the win rate of two players in its closed form."""
    labels = random_labels(100)
    battles = pd.Series([win for each in verdicts(labels) for win in each.battles])
    np.random.seed(42)  # noqa: NPY002 - as there
    shares = np.array([battles.sample(frac=1.0, replace=True).mean() for _ in range(100)])
    ratings = np.percentile(np.log(shares / (1 - shares)), (2.5, 97.5))

    score = battles_resampled(verdicts(labels), rounds=100, seed=42)

    assert score.value == pytest.approx(100 * battles.mean(), abs=1e-3)
    assert (score.low, score.high) == pytest.approx(tuple(100 / (1 + np.exp(-ratings))), abs=1e-3)
    assert score.standard_error == pytest.approx(100 * shares.std(ddof=1), abs=1e-3)


def test_questions_are_drawn_whole() -> None:
    """Six battles of a question that say one thing are one: the interval is the square root of six times as wide."""
    rng = np.random.default_rng(0)
    labels = [(("B>>A", "A>>B") if won else ("A>>B", "B>>A")) for won in rng.random(150) < 0.4]
    battles = battles_resampled(verdicts(labels), rounds=100, seed=42)
    whole = questions_resampled(verdicts(labels), rounds=100, seed=42)

    assert whole.value == battles.value
    assert (whole.standard_error or 0) / (battles.standard_error or 1) == pytest.approx(6**0.5, rel=0.25)


# ---- labels and files


@pytest.mark.row("58")
@pytest.mark.parametrize(
    ("text", "label", "again"),
    [
        ("so [[A>B]]", "A>B", False),
        ("[[A>B]] and once more [[A>B]]", "A>B", False),
        ("either [[A>B]] or [[B>A]]", None, False),  # which one was meant is not guessed
        ("A is better", None, True),
        ("", None, True),
        ("[A>B] [[C>D]] [[ A>B ]]", None, True),
    ],
)
def test_one_label_is_a_verdict_two_are_none_and_no_label_is_asked_for(
    text: str, label: str | None, again: bool
) -> None:
    assert label_in(text, re.compile(LABEL_PATTERN)) == (label, again)


def test_judgments_there_are_become_a_result(tmp_path: Path) -> None:
    labels = [("B>A", "A>B"), ("A>B", None), ("A=B", "A>>B"), (None, None), ("A>B", "A>B"), ("what", None)]
    file = judgments(tmp_path / "mine.jsonl", labels)
    questions = tmp_path / "question.jsonl"
    rows = [{"question_id": f"q{number}", "turns": [{"content": f"What about q{number}?"}]} for number in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = evaluate_judgments(file, questions=questions)

    assert (result.benchmark, result.model, result.judge) == ("arena_hard_v0.1", "mine", "gpt-4-1106-preview")
    assert result.scores["win_rate"].value == pytest.approx(100 * 6.5 / 9, abs=1e-3)
    assert result.counts == {
        "questions": 6,
        "games": 12,
        "battles": 9,
        "ties": 1,
        "strong_verdicts": 1,
        "games_without_label": 4,
        "games_with_unknown_label": 1,
        "questions_judged_in_one_order": 1,
        "questions_without_verdict": 2,
        "questions_with_opposite_verdicts": 1,
    }
    assert [item["preference"] for item in result.items] == [1.0, 0.0, 0.875, None, 0.5, None]
    assert result.items[0]["prompt_sha256"] == prompt_sha256("What about q0?")
    assert "5 of 12 games have no verdict and do not count" in result.notes
    assert "what the judge was told is not known" in result.notes
    assert result.scores["first_answer_preferred"].value == pytest.approx(100 * 5 / 6)
    assert any("read first in 83.3%" in note for note in result.notes)
    assert not any("published numbers are judged by" in note for note in result.notes)
    result.write(tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result


def test_the_files_of_later_releases_are_read_too(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in judgments(tmp_path / "a.jsonl", random_labels(5)).read_text().splitlines()]
    later = [{"uid": row.pop("question_id"), **row} for row in rows]
    later[0]["games"][1] = None  # as there, where a server gave nothing
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in later))

    first, second = (read_judgments(tmp_path / name).verdicts for name in ("a.jsonl", "b.jsonl"))

    assert second[1:] == first[1:]
    assert second[0].labels == (first[0].labels[0], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"games": [{"score": "A>B"}]}, r"mine.jsonl, row 1, key `games`: expected 2 games"),
        ({"games": [{"score": "A>B"}, {}]}, r"row 1, key `games\[1\].score`: missing"),
        ({"games": [{"score": "A>B"}, {"score": 3}]}, r"row 1, key `games\[1\].score`: expected a string"),
        ({"question_id": None}, "row 1, key `question_id`: expected a string"),
        ({"question_id": "q"}, "row 2: question q is judged a second time"),
        ({"model": None}, "row 1, key `model`: expected a string"),
    ],
)
def test_malformed_judgments_are_refused_by_row_and_key(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_judgments(judgments(tmp_path / "mine.jsonl", random_labels(2), **change))


def test_judgments_of_two_models_or_without_any_verdict_are_refused(tmp_path: Path) -> None:
    one, other = (judgments(tmp_path / f"{name}.jsonl", [("A>B", None)], model=name) for name in ("one", "other"))
    both = tmp_path / "both.jsonl"
    both.write_text(one.read_text() + other.read_text().replace("q0", "q1"))
    with pytest.raises(InputError, match=r"`model` has several values \(one, other\)"):
        evaluate_judgments(both)
    with pytest.raises(InputError, match="no verdict at all"):
        evaluate_judgments(judgments(tmp_path / "none.jsonl", [(None, None)]))
    alike = evaluate_judgments(judgments(tmp_path / "alike.jsonl", [("B>A", "A>>B")]))
    assert "every battle ended alike, so drawing them again gives no interval" in alike.notes
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no judgments"):
        evaluate_judgments(tmp_path / "empty.jsonl")
