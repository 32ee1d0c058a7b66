"""From prompts to AlpacaEval's and Arena-Hard's numbers through one faulty server: all right, and no key anywhere."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorafocal.evaluate.result import read_result
from tests.command import call
from tests.openai_server import Body, Fault, Said, Server, cut, malformed, no_choices, serving, status

pytestmark = pytest.mark.slow

KEY = "sk-made-up-0123456789abcdef"
SECRET = "the rosebud of the wine-dark sea"  # in every prompt
PROMPTS = [f"{SECRET}: what is {n}?" for n in range(6)]
PASSING: list[Fault] = [status(500), malformed, status(429, "slow_down"), no_choices, cut, status(503)]
VERBS = ["generate", "alpaca", "arena"]
STAYING = {"generate": cut, "alpaca": status(400, "bad_request"), "arena": status(401)}
QUESTIONS = {"generate": 6, "alpaca": 6, "arena": 12}
JOURNALS = ("journal.jsonl", "replies.jsonl")  # a line a reply
WITH_TEXTS = {"mine.json", "alpaca.annotations.json", "arena.judgments.jsonl"}


def answer(body: Body) -> Said:
    """A model that says little, and a judge who likes what it says, by either protocol."""
    said = body["messages"][-1]["content"]
    if body.get("logprobs"):
        first = said.index("answer of mine") < said.index("answer of other")
        liked, other = ("m", "M") if first else ("M", "m")
        return Said(liked, [{liked: math.log(0.75), other: math.log(0.25)}])
    if "answer of other" in said:
        return Said("[[A>B]]" if said.index("answer of mine") < said.index("answer of other") else "[[B>A]]")
    return Said(f"answer of {body['model']}, number {len(said)}")


@dataclass
class Bench:
    """A folder with prompts and a server; `run` is the command line."""

    folder: Path
    server: Server
    run: Callable[..., int]

    def verb(self, verb: str, out: str = "out", attempts: int = 6) -> int:
        """One of VERBS, with a key; what it reads beyond the prompts is there."""
        asks = ["--server", self.server.url, "--key-variable", "THE_KEY", "--concurrency", 2, "--attempts", attempts]
        asks += ["--yes"]
        place, inputs = self.folder / out, self.folder / "inputs"
        if verb == "generate":
            given = ["mine", "--prompts", self.folder / "prompts.json", "--preset", "greedy"]
            return self.run("generate", *given, "--out", place / "mine.json", *asks)
        if verb == "alpaca":
            given = [inputs / "mine.json", "--reference", inputs / "other.json"]
        else:
            given = [inputs / "mine-arena.jsonl", "--questions", self.folder / "question.jsonl"]
            given += ["--baseline", inputs / "other-arena.jsonl"]
        return self.run("evaluate", verb, *given, "--judge", "judge", "--out", place / f"{verb}.json", *asks)

    def files(self, out: str = "out") -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / out).iterdir())}

    def results(self, out: str = "out") -> dict[str, bytes]:
        """Without the journals, whose lines come as the replies do."""
        return {name: content for name, content in self.files(out).items() if "journal" not in name}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts in both forms, two models' answers to them from a server, and what the verbs make where nothing fails."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("out", "inputs", *VERBS):
        (folder / name).mkdir()
    (folder / "prompts.json").write_text(json.dumps([{"instruction": text, "dataset": "d"} for text in PROMPTS]))
    rows = [
        {"question_id": str(n), "category": "c", "cluster": "d", "turns": [{"content": text}]}
        for n, text in enumerate(PROMPTS)
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch, serving(answer) as server:
        patch.setenv("THE_KEY", KEY)
        for model in ("mine", "other"):
            for prompts, out in (("prompts.json", f"{model}.json"), ("question.jsonl", f"{model}-arena.jsonl")):
                files = ["--prompts", folder / prompts, "--out", folder / "inputs" / out]
                assert call(patch, "generate", model, *files, "--preset", "arena-hard", "--server", server.url) == 0
        for verb in VERBS:
            assert Bench(folder, server, lambda *words: call(patch, *words)).verb(verb, verb) == 0
    return folder


@pytest.fixture
def bench(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], Bench]:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", f"another-{KEY}")
    for path in (prepared / "out").iterdir():
        path.unlink()
    return lambda server: Bench(prepared, server, lambda *words: call(monkeypatch, *words))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that was logged, at every level, and printed since it was last asked."""
    caplog.set_level(logging.DEBUG)

    def since() -> str:
        text = "\n".join([caplog.text, *capfd.readouterr()])
        caplog.clear()
        return text

    return since


def check_no_secret(bench: Bench, heard: str) -> None:
    """No key in any byte; no prompt in what is printed, logged or kept beside the texts; no host in any file."""
    files = {name: content.decode() for name, content in bench.files().items()}
    assert not [text for text in (heard, *files.values()) if KEY[:12] in text]
    assert SECRET[:16] not in heard
    assert not [name for name, text in files.items() if SECRET[:16] in text and name not in WITH_TEXTS]
    host = bench.server.url.partition("//")[2].partition("/")[0]
    assert not [name for name, text in files.items() if host in text]


@pytest.mark.row("S8")
@pytest.mark.parametrize("verb", VERBS)
def test_faults_that_pass_change_no_byte(bench: Callable[[Server], Bench], heard: Callable[[], str], verb: str) -> None:
    with serving(answer, faults=PASSING, key=KEY) as server:
        mine = bench(server)
        assert mine.verb(verb) == 0
    assert set(server.keys) == {KEY}
    check_no_secret(mine, heard())
    assert mine.results() == mine.results(verb)


@pytest.mark.row("S8")
@pytest.mark.parametrize("verb", VERBS)
def test_a_call_that_cannot_finish_says_so_and_the_same_call_goes_on(
    bench: Callable[[Server], Bench], heard: Callable[[], str], verb: str
) -> None:
    with serving(answer, faults=[None, None, *[STAYING[verb]] * 5], key=KEY) as server:
        mine = bench(server)
        assert mine.verb(verb, attempts=2) == 2
    said = heard()
    assert "Traceback" not in said
    assert "the same command" in said
    check_no_secret(mine, said)
    assert not set(mine.files()) & {"mine.json", "alpaca.json", "arena.json"}, "nothing half-made has its name"
    [journal] = [content for name, content in mine.files().items() if name.endswith(JOURNALS)]
    with serving(answer, key=KEY) as server:
        mine.server = server
        assert mine.verb(verb) == 0
    check_no_secret(mine, heard())
    assert mine.results() == mine.results(verb)
    assert len(server.requests) == QUESTIONS[verb] - journal.count(b"\n")


@pytest.mark.parametrize(
    ("verb", "score", "value"), [("alpaca", "win_rate", 75.0), ("arena", "win_rate", 100.0)], ids=["alpaca", "arena"]
)
def test_the_numbers_are_the_judges(prepared: Path, verb: str, score: str, value: float) -> None:
    result = read_result(prepared / verb / f"{verb}.json")
    assert result.scores[score].value == pytest.approx(value, abs=1e-3)
    assert (result.judge, result.model) == ("judge", "mine")


@pytest.mark.parametrize("verb", VERBS)
def test_nobody_pays_unasked(
    bench: Callable[[Server], Bench], monkeypatch: pytest.MonkeyPatch, heard: Callable[[], str], verb: str
) -> None:
    with serving(answer) as server:
        mine = bench(server)
        mine.run = lambda *words: call(monkeypatch, *(word for word in words if word != "--yes"))
        assert mine.verb(verb) == 2
        assert "--yes" in heard()
    assert server.requests == []
    assert set(mine.files()) <= {"mine.partial.jsonl"}, "what is to be made, without an answer"
