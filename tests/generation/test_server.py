"""Answers from a server: what is asked is the preset, what is kept is a file that an interruption does not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorafocal.endpoints import Endpoint
from lorafocal.errors import InputError
from lorafocal.generation import GenerationReport, generate
from lorafocal.generation.formats import read_answers
from tests.openai_server import Said, Server, serving, status

KEY = "sk-made-up-0123456789abcdef"
INSTRUCTIONS = [f"say {word}" for word in ("one", "two", "three", "four", "five", "one")]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"instruction": text, "dataset": "made up"} for text in INSTRUCTIONS]))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"question_id": "q1", "category": "c", "cluster": "d", "turns": [{"content": "a"}, {"content": "b"}]},
        {"question_id": "q2", "category": "c", "cluster": "d", "turns": [{"content": "c"}]},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(server: Server, prompts: Path, out: Path, preset: str = "greedy", **how: Any) -> GenerationReport:
    out.parent.mkdir(exist_ok=True)
    endpoint = Endpoint("served-model", server.url, concurrency=how.pop("concurrency", 2), attempts=1)
    return generate(
        "mine",
        prompts,
        out=out,
        preset=preset,
        server=endpoint,
        **{"say": lambda line: None, "approve": lambda spending: True} | how,
    )


def files(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_answers_are_alpacaevals_file_in_the_order_of_the_prompts(tmp_path: Path, prompts: Path) -> None:
    with serving() as server:
        report = generated(server, prompts, tmp_path / "out" / "mine.json")
    rows = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert rows == [
        {"instruction": text, "output": text.upper(), "generator": "mine", "dataset": "made up"}
        for text in INSTRUCTIONS
    ]
    assert (report.answers, report.engine, report.length_limit) == (6, "server", 0)
    assert set(files(tmp_path / "out")) == {"mine.json", "mine.provenance.json"}
    assert len(server.requests) == 5, "equal prompts under greedy decoding have one answer"


def test_a_preset_is_what_the_server_is_asked_for(tmp_path: Path, prompts: Path) -> None:
    with serving() as server:
        generated(server, prompts, tmp_path / "out" / "a.json", "llama3-alpaca", seed=5, concurrency=1)
        generated(server, prompts, tmp_path / "out" / "b.json", "mistral-base-alpaca", top_k=7, concurrency=1)
        generated(server, prompts, tmp_path / "out" / "c.json", "greedy", max_new_tokens=9, concurrency=1)
    first, second, third = (server.requests[start] for start in (0, 6, 12))
    assert [request["seed"] for request in server.requests[:6]] == [5, 6, 7, 8, 9, 10]
    user = {"role": "user", "content": "say one"}
    assert first == {
        "model": "served-model", "messages": [user], "max_tokens": 4096, "temperature": 0.9, "top_p": 1.0, "seed": 5,
    }  # fmt: skip
    assert second["messages"] == [{"role": "system", "content": ""}, user]
    assert (second["temperature"], second["max_tokens"], second["top_k"]) == (0.7, 2048, 7)
    assert third == {"model": "served-model", "messages": [user], "max_tokens": 9, "temperature": 0.0}


def test_later_turns_are_asked_after_the_answers_to_the_earlier(tmp_path: Path, questions: Path) -> None:
    with serving() as server:
        generated(server, questions, tmp_path / "out" / "mine.jsonl", "arena-hard")
    answers = read_answers(tmp_path / "out" / "mine.jsonl")
    assert [(row.question_id, row.turns) for row in answers.rows] == [("q1", ("A", "B")), ("q2", ("C",))]
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["a", "A", "b"]


@pytest.mark.parametrize("broken", range(4))
def test_what_a_broken_call_left_is_not_asked_again_and_does_not_show(
    tmp_path: Path, questions: Path, prompts: Path, broken: int
) -> None:
    path = prompts if broken < 3 else questions
    name, total = ("mine.json", 6) if broken < 3 else ("mine.jsonl", 3)
    how = {"preset": "llama3-alpaca", "concurrency": 1}

    def answer(body: dict) -> Said:
        return Said(body["messages"][-1]["content"].upper(), finish_reason="length" if "two" in str(body) else "odd")

    with serving(answer) as server:
        whole = generated(server, path, tmp_path / "whole" / name, **how)
    with serving(answer, faults=[None] * min(broken, 2) + [status(500)]) as server:
        with pytest.raises(InputError, match=r"no reply \(1 x HTTP 500\). The others are kept"):
            generated(server, path, tmp_path / "out" / name, **how)
        assert not (tmp_path / "out" / name).exists()
        report = generated(server, path, tmp_path / "out" / name, **how)
        assert len(server.requests) == total + 1
        assert generated(server, path, tmp_path / "out" / name, **how) == report, "complete: nothing is asked"
        assert len(server.requests) == total + 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (report.counts, report.notes) == (whole.counts, whole.notes)


def test_other_settings_are_refused_by_name(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "out" / "mine.json"
    with serving(faults=[status(500)]) as server:
        with pytest.raises(InputError, match="no reply"):
            generated(server, prompts, out)
        with pytest.raises(InputError, match="max_new_tokens"):
            generated(server, prompts, out, max_new_tokens=7)
        assert len(server.requests) == 5


def test_what_the_answers_are_is_said_beside_them(tmp_path: Path, prompts: Path) -> None:
    ends = {"say two": "length", "say three": "content_filter"}

    def answer(body: dict) -> Said:
        text = body["messages"][0]["content"]
        body["model"] = "served-model-2026-11"
        return Said(None if text == "say three" else "yes", finish_reason=ends.get(text, "stop"))

    with serving(answer) as server:
        report = generated(server, prompts, tmp_path / "out" / "mine.json")
    record = read_answers(tmp_path / "out" / "mine.json").provenance
    assert record is not None
    assert report.length_limit == record["counts"]["length_limit"] == 1
    assert record["target"]["name"] == "served-model"
    assert record["notes"] == list(report.notes)
    template, *notes = report.notes
    assert "its own chat template" in template
    assert notes == [
        "asked for served-model, the server answered as served-model-2026-11",
        "answers that neither ended nor were cut: 1 (content_filter)",
        "1 of the answers is empty",
    ]


def test_one_provenance_is_not_written_over_another(tmp_path: Path, prompts: Path, questions: Path) -> None:
    with serving() as server:
        generated(server, prompts, tmp_path / "out" / "mine.json")
        before = files(tmp_path / "out")
        with pytest.raises(InputError, match=r"mine\.provenance\.json describes mine\.json already"):
            generated(server, questions, tmp_path / "out" / "mine.jsonl")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("how", [{"base": "a"}, {"engine": "vllm"}], ids=str)
def test_what_is_of_this_machine_is_refused(tmp_path: Path, prompts: Path, how: dict[str, str]) -> None:
    with serving() as server, pytest.raises(InputError, match="leave it out"):
        generated(server, prompts, tmp_path / "out" / "mine.json", **how)
    assert server.requests == []


@pytest.mark.parametrize("approve", [None, lambda spending: False])
def test_nothing_is_sent_without_consent(tmp_path: Path, prompts: Path, approve: Any) -> None:
    with serving() as server, pytest.raises(InputError, match=r"not agreed to 5 questions: .* nothing was sent"):
        generated(server, prompts, tmp_path / "out" / "mine.json", approve=approve)
    assert server.requests == []
