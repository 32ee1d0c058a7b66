"""Arena-Hard: verdicts with a known win rate, judging through a server that fails, files, intervals and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lorafocal.endpoints import Endpoint, Spending
from lorafocal.errors import InputError
from lorafocal.evaluate.arena import evaluate_arena, evaluate_judgments
from lorafocal.evaluate.arena_prompt import LABEL_PATTERN, JudgePrompt, read_judge_prompt
from lorafocal.evaluate.arena_verdicts import Verdicts, label_in, read_judgments
from lorafocal.evaluate.arena_win_rate import battles_resampled, questions_resampled
from lorafocal.evaluate.result import Result, prompt_sha256, read_result
from tests.openai_server import Body, Fault, Said, Server, cut, malformed, no_choices, serving, status

KEY = "sk-made-up-0123456789"
CONFIG = """\
name: a judge of the tests
bench_name: arena-hard-v0.1
judge_model: gpt-4-1106-preview
reference: False
ref_model: null
baseline: True
baseline_model: gpt-4-0314
pairwise: True
temperature: 0
max_tokens: 128
regex_pattern: \\[\\[([AB<>=]+)\\]\\]
number_of_judgment_attempts: 2
system_prompt: "Say which is better."
prompt_template: ["{question_1}|{answer_1}|{answer_2}"]
model_list:
  - mine
"""
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
    questions.write_text("".join(question(f"q{number}") for number in range(6)))

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


# ---- judging


def question(name: str) -> str:
    row = {"question_id": name, "category": "c", "cluster": "k", "turns": [{"content": f"What about {name}?"}]}
    return json.dumps(row) + "\n"


def answer(name: str, model: str, text: str) -> str:
    turns = [{"content": text, "token_len": 2}]
    return json.dumps({"question_id": name, "model_id": model, "choices": [{"index": 0, "turns": turns}]}) + "\n"


class Arena:
    """Files of a small benchmark, and the way to judge them."""

    def __init__(self, folder: Path, count: int = 6) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        names = [f"q{number}" for number in range(count)]
        self.write("question.jsonl", [question(name) for name in names])
        self.write("mine.jsonl", [answer(name, "mine", f"mine to {name}") for name in names])
        self.write("base.jsonl", [answer(name, "gpt-4-0314", f"base to {name}") for name in names])
        self.write("judge.yaml", [CONFIG])

    def write(self, name: str, lines: list[str]) -> None:
        (self.folder / name).write_text("".join(lines), encoding="utf-8")

    def judged(self, server: Server, **options: Any) -> Result:
        files = {"questions": "question.jsonl", "baseline": "base.jsonl", "judge_config": "judge.yaml"}
        given: dict[str, Any] = {
            **{key: self.folder / name for key, name in files.items()},
            "judge": Endpoint("gpt-4.1", server.url, key_variable="KEY_OF_THE_JUDGE", concurrency=2, attempts=4),
            "journal": self.folder / "out.journal.jsonl",
            "judgments": self.folder / "out.judgments.jsonl",
            "approve": lambda spending: True,
            "say": lambda line: None,
            "rounds": 5,
        }
        return evaluate_arena(self.folder / "mine.jsonl", **given | options)

    @property
    def kept(self) -> bytes:
        return (self.folder / "out.judgments.jsonl").read_bytes()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_THE_JUDGE", KEY)


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path / "arena")


def asked(body: Body) -> tuple[str, str, str]:
    """Question, answer of A and answer of B in a request by CONFIG's template."""
    question, first, second = body["messages"][1]["content"].split("|")
    return question, first, second


def likes_mine(body: Body) -> str:
    """Mine, a little; much more in question 1; not in question 2."""
    name, first, _ = asked(body)
    better, worse = ("A", "B") if first.startswith("mine") != ("q2" in name) else ("B", "A")
    return f"I think [[{better}{'>>' if 'q1' in name else '>'}{worse}]]"


@pytest.mark.row("58")
def test_each_question_is_judged_in_both_orders(arena: Arena) -> None:
    with serving(likes_mine) as server:
        result = arena.judged(server)

    sent = sorted(asked(body) for body in server.requests)
    assert sent == sorted(
        (f"What about q{n}?", f"{a} to q{n}", f"{b} to q{n}")
        for n in range(6)
        for a, b in [("mine", "base"), ("base", "mine")]
    )
    assert all(body["messages"][0]["content"] == "Say which is better." for body in server.requests)
    assert {(body["temperature"], body["max_tokens"]) for body in server.requests} == {(0, 128)}
    assert result.scores["win_rate"].value == pytest.approx(100 * 14 / 16, abs=1e-3)
    assert result.counts["questions_with_opposite_verdicts"] == 0
    assert result.settings["baseline"] == "gpt-4-0314"
    assert [item["preference"] for item in result.items] == [1, 1, 0, 1, 1, 1]
    again = evaluate_judgments(arena.folder / "out.judgments.jsonl", rounds=5)
    assert again.scores == result.scores


def test_a_judge_without_a_label_is_asked_to_go_on_once(arena: Arena) -> None:
    def slow_to_decide(body: Body) -> str | Said:
        name, _, _ = asked(body)
        if "q0" in name:
            return "I shall never say."
        if "q1" in name:
            return "it is [[A>B]] or [[B>A]]"
        if "q2" in name and len(body["messages"]) == 2:
            return Said("let me think", finish_reason="length")
        return likes_mine(body)

    with serving(slow_to_decide) as server:
        result = arena.judged(server)

    longer = [body["messages"] for body in server.requests if len(body["messages"]) > 2]
    assert len(longer) == 4  # both games of q0 and q2, once
    assert all([m["role"] for m in chat] == ["system", "user", "assistant", "user"] for chat in longer)
    assert {key: result.counts[key] for key in ("asked_again", "cut_replies", "games_without_label")} == {
        "asked_again": 4,
        "cut_replies": 2,
        "games_without_label": 4,
    }
    rows = [json.loads(line) for line in arena.kept.decode().splitlines()]
    assert rows[2]["games"][0]["judgment"] == "\nlet me think\nI think [[A>B]]"
    assert [game["score"] for row in rows[:2] for game in row["games"]] == [None] * 4


def test_a_server_that_stumbles_changes_nothing(arena: Arena) -> None:
    faults: list[Fault | None] = [None, status(500), malformed, None, status(429), cut, no_choices, status(503), None]
    with serving(likes_mine) as server:
        expected = arena.judged(server)
    stumbling = Arena(arena.folder.parent / "stumbling")
    with serving(likes_mine, faults=faults) as server:
        assert stumbling.judged(server) == expected
    assert len(server.requests) == 12 + 6
    assert stumbling.kept == arena.kept


def test_what_was_judged_is_not_asked_again_and_the_bytes_are_those_of_one_go(arena: Arena) -> None:
    """A server that refuses a question: everything else is kept, and the same call goes on."""
    refused = {"on": True}

    def sometimes(body: Body, key: str | None, respond: Callable[..., None]) -> None:
        content = json.dumps({"error": {"message": "no", "code": "content_filter", "type": None}}).encode()
        text = json.dumps({"choices": [{"message": {"content": likes_mine(body)}, "finish_reason": "stop"}]}).encode()
        hit = refused["on"] and "q3" in asked(body)[0]
        respond(400, content, {}) if hit else respond(200, text, {})

    with serving(likes_mine, faults=[sometimes] * 100) as server:
        with pytest.raises(InputError, match=r"2 of 12 questions have no reply.*the same command.*--allow-missing"):
            arena.judged(server)
        assert not (arena.folder / "out.judgments.jsonl").exists()
        first = len(server.requests)
        told: list[Spending] = []

        def agree(spending: Spending) -> bool:
            told.append(spending)
            return True

        refused["on"] = False
        finished = arena.judged(server, approve=agree)
        assert len(server.requests) - first == 2
        assert [spending.questions for spending in told] == [2]
        kept = arena.kept
        assert arena.judged(server) == finished
        assert len(server.requests) - first == 2
        assert arena.kept == kept

    whole = Arena(arena.folder.parent / "whole")
    with serving(likes_mine, faults=[sometimes] * 100) as server:
        assert whole.judged(server) == finished
    assert whole.kept == kept


def test_missing_games_that_are_allowed_are_counted_and_named(arena: Arena) -> None:
    def no_q3(body: Body, key: str | None, respond: Callable[..., None]) -> None:
        text = json.dumps({"choices": [{"message": {"content": likes_mine(body)}, "finish_reason": "stop"}]}).encode()
        respond(400, b"{}", {}) if asked(body) == ("What about q3?", "base to q3", "mine to q3") else respond(
            200, text, {}
        )

    with serving(likes_mine, faults=[no_q3] * 100) as server:
        result = arena.judged(server, allowed_missing=1)
    assert (result.counts["without_reply"], result.counts["questions_judged_in_one_order"]) == (1, 1)
    assert "1 of 12 games have no verdict and do not count" in result.notes
    assert result.scores["win_rate"].value == pytest.approx(100 * 13 / 15, abs=1e-3)


def test_no_file_holds_the_key_and_the_journal_no_prompt(arena: Arena) -> None:
    said: list[str] = []
    with serving(likes_mine, faults=[status(500)]) as server:
        result = arena.judged(server, say=said.append)
    result.write(arena.folder / "result.json")

    assert set(server.keys) == {KEY}
    written = [path.read_text() for path in arena.folder.iterdir()]
    assert not any(KEY in text for text in [*written, *said])
    assert not any("What about" in text for text in [(arena.folder / "out.journal.jsonl").read_text(), *said])
    assert str(arena.folder) not in (arena.folder / "result.json").read_text()
    assert server.url not in (arena.folder / "result.json").read_text()


def test_what_sets_the_number_apart_is_noted(arena: Arena) -> None:
    arena.write("base.jsonl", [answer(f"q{n}", "another", "$ERROR$" if n else "x") for n in range(6)])
    with serving(lambda body: "[[A>B]]") as server:
        result = arena.judged(server, judge_config=None)
    assert result.notes[:4] == (
        "judged by gpt-4.1; published numbers are judged by gpt-4-1106-preview",
        "the judge's prompt is lorafocal's own, not Arena-Hard's, which --judge-config gives",
        "compared with another; published numbers are against gpt-4-0314",
        "6 questions were judged; Arena-Hard v0.1 has 500",
    )
    assert any("read first in 100.0%" in note for note in result.notes)
    assert "5 answers of the baseline are $ERROR$, which stands where a server gave none" in result.notes
    assert result.scores["win_rate"].value == pytest.approx(50, abs=1e-3)
    assert result.counts["questions_with_opposite_verdicts"] == 6
    assert (result.settings["judge_prompt"], result.settings["judge_prompt_sha256"]) == (
        "lorafocal's own",
        JudgePrompt().sha256,
    )


# ---- refusals before anything is sent


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"mine.jsonl": [answer("q0", "mine", "a")]}, {}, r"mine.jsonl does not answer 5 of 6 questions \(first q1\)"),
        ({"base.jsonl": [answer("q0", "b", "a")]}, {}, r"base.jsonl does not answer 5 of 6"),
        ({"base.jsonl": [answer(f"q{n}", "mine", "a") for n in range(6)]}, {}, "both answers of mine"),
        ({"mine.jsonl": ['{"instruction": "a", "output": "b", "generator": "c"}\n']}, {}, "not in Arena-Hard's form"),
        ({"question.jsonl": ['{"instruction": "a"}\n']}, {}, "no Arena-Hard questions"),
        ({"out.judgments.jsonl": ["somebody's\n"]}, {}, "exists already"),
        ({"judge.yaml": ["a: 1\n"]}, {}, "judge.yaml lacks system_prompt, prompt_template, regex_pattern"),
        ({"judge.yaml": [CONFIG, "b: 1\n"]}, {}, "judge.yaml: b is no key"),
        ({"judge.yaml": [CONFIG.replace("pairwise: True", "pairwise: False")]}, {}, "pairwise is true in Arena-Hard"),
        ({"judge.yaml": [CONFIG.replace("{answer_2}", "")]}, {}, "speaks of answer_1, question_1"),
        ({"judge.yaml": [CONFIG.replace("{answer_2}", "{answer_2.__class__}")]}, {}, "prompt_template has places"),
        ({"judge.yaml": [CONFIG.replace("{answer_2}", "{answer_2")]}, {}, "cannot be filled"),
        ({"judge.yaml": [CONFIG.replace("+)", "+")]}, {}, "no regular expression"),
        ({"judge.yaml": [CONFIG.replace("([AB<>=]+)", "[AB<>=]+")]}, {}, "one group, the label"),
        ({"judge.yaml": [CONFIG.replace("max_tokens: 128", "max_tokens: many")]}, {}, "max_tokens is 'many'"),
        ({"judge.yaml": [CONFIG.replace("attempts: 2", "attempts: 0")]}, {}, "attempts is 1 or more"),
        ({}, {"approve": lambda spending: False}, "not agreed to 12 questions"),
        ({}, {"rounds": 1}, "rounds of the bootstrap"),
        ({}, {"judgments": Path("nowhere") / "out.jsonl"}, "the folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_sent(
    arena: Arena, files: dict[str, list[str]], options: dict[str, Any], message: str
) -> None:
    for name, lines in files.items():
        arena.write(name, lines)
    with serving(likes_mine) as server, pytest.raises(InputError, match=message):
        arena.judged(server, **options)
    assert server.requests == []


def test_several_turns_want_a_template_that_names_them(tmp_path: Path) -> None:
    config = tmp_path / "judge.yaml"
    places = "{question_1}|{answer_1}|{answer_3}|{question_2}|{answer_2}|{answer_4}"
    config.write_text(CONFIG.replace("{question_1}|{answer_1}|{answer_2}", places))
    turns = (("first?", "second?"), ("a1", "a2"), ("b1", "b2"))

    assert read_judge_prompt(config).messages(*turns)[1]["content"] == "first?|a1|b1|second?|a2|b2"
    with pytest.raises(InputError, match="for as many turns"):
        JudgePrompt().messages(*turns)


def test_a_text_with_braces_is_only_a_text() -> None:
    [_, user] = JudgePrompt().messages(["{answer_1} {x}"], ["{0}"], ["{question_1}"])
    assert "{answer_1} {x}" in user["content"]
    assert "{0}" in user["content"]
    assert "{question_1}" in user["content"]


def test_null_options_are_left_out_for_judges_that_take_none(tmp_path: Path) -> None:
    config = tmp_path / "judge.yaml"
    config.write_text(CONFIG.replace("temperature: 0", "temperature: null"))
    assert read_judge_prompt(config).options == {"max_tokens": 128}
