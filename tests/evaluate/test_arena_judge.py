"""Arena-Hard's judging: both orders, through a server that fails, gone on with, refused before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafocal.endpoints import Endpoint, Spending
from lorafocal.errors import InputError
from lorafocal.evaluate.arena import evaluate_arena, evaluate_judgments
from lorafocal.evaluate.arena_prompt import JudgePrompt, read_judge_prompt
from lorafocal.evaluate.result import Result
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
    assert any(note.startswith("4 judgments had no label at first") for note in result.notes)
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
