"""`generate` and the verbs of `evaluate`: every option is passed on, none is ignored, and nobody pays unasked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafocal.cli.servers import approval_of
from lorafocal.endpoints import Endpoint, Spending
from lorafocal.errors import InputError
from lorafocal.evaluate.result import Result
from tests.command import Report, call, stand_in
from tests.openai_server import Body, Said, serving

pytestmark = pytest.mark.slow

JUDGING = (
    "--judge j --server http://localhost:1/v1 --key-variable K --concurrency 3 --timeout 4 --attempts 2"
    " --per-minute 90 --price 2.5,10 --yes --allow-missing 1"
).split()
JUDGE = Endpoint("j", "http://localhost:1/v1", "K", 3, 4.0, 2, 90.0)


@pytest.fixture(autouse=True)
def _where_folders_may_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Found(Report):
    """A result that remembers where it was written."""

    def __init__(self) -> None:
        self.written: list[Path] = []

    def write(self, path: Path) -> None:
        self.written.append(path)


def without(calls: list[Any], *passed_on: str) -> list[Any]:
    """The calls but for functions, which are no value."""
    return [(args, {k: v for k, v in kwargs.items() if k not in ("say", *passed_on)}) for args, kwargs in calls]


def test_generate_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "generation", "generate", Report())
    options = "--prompts p --out o --preset arena-hard --max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7"
    more = "--seed 3 --system s --base b --engine vllm --batch-tokens 9 --name n"
    assert call(monkeypatch, "generate", "t", *options.split(), *more.split()) == 0
    drawing = {"preset": "arena-hard", "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3}
    made = {"system": "s", "base": "b", "engine": "vllm", "batch_tokens": 9, "name": "n", "server": None, "price": None}
    assert without(calls, "approve") == [(("t", Path("p")), {"out": Path("o"), **drawing, **made})]
    assert calls[0][1]["approve"] is None


def test_generate_asks_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "generation", "generate", Report())
    where = "--prompts p --out o --server http://localhost:1/v1 --concurrency 2 --timeout 9 --price 1,2".split()
    assert call(monkeypatch, "generate", "served", *where) == 0
    assert calls[0][1]["price"] == (1.0, 2.0)
    assert calls[0][1]["approve"](COSTLY)  # no key goes there: nothing to bill
    assert calls[0][1]["server"] == Endpoint("served", "http://localhost:1/v1", concurrency=2, timeout_s=9.0)
    assert call(monkeypatch, "generate", "served", *where, "--base", "b", "--engine", "vllm") == 2
    assert "--base, --engine: the server named by --server decides that" in capsys.readouterr().err
    assert call(monkeypatch, "generate", "t", "--prompts", "p", "--out", "o", "--attempts", "2") == 2
    assert "--attempts: only with --server" in capsys.readouterr().err


def test_alpaca_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "evaluate.alpaca", "evaluate_alpaca", found := Found())
    options = "--reference r --gamed g --annotator a --out results/x.json".split()
    assert call(monkeypatch, "evaluate", "alpaca", "answers.json", *JUDGING, *options) == 0
    kept = {
        "journal": Path("results/x.journal.jsonl"),
        "annotations_out": Path("results/x.annotations.json"),
        "reference": Path("r"),
        "gamed": Path("g"),
        "annotator": "a",
    }
    judge = {"judge": JUDGE, "price": (2.5, 10.0), "allowed_missing": 1}
    assert without(calls, "approve") == [((Path("answers.json"),), kept | judge)]
    assert found.written == [Path("results/x.json")]


def test_annotations_need_no_judge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "evaluate.alpaca", "evaluate_annotations", Found())
    assert call(monkeypatch, "evaluate", "alpaca", "--annotations", "a", "--gamed", "g", "--reference", "r") == 0
    assert calls == [((Path("a"),), {"gamed": Path("g"), "reference": Path("r")})]
    assert call(monkeypatch, "evaluate", "alpaca", "--annotations", "a", *JUDGING) == 2
    named = "--judge, --server, --key-variable, --concurrency, --timeout, --attempts, --per-minute, --price, --yes"
    assert f"{named}, --allow-missing: no judge is asked" in capsys.readouterr().err
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alpaca"], "give the answers to be judged, or --annotations"),
        (["alpaca", "x", "--annotations", "y"], "one of the two"),
        (["alpaca", "x", "--out", "o"], "name the judge by --judge"),
        (["alpaca", "x", "--judge", "j"], "give --out FILE"),
        (["alpaca", "x", "--judge", "j", "--out", "o", "--server", "localhost"], "the server's URL is not one"),
        (["alpaca", "x", "--judge", "j", "--out", "o", "--price", "2"], "--price '2': give USD"),
        (["alpaca", "x", "--judge", "j", "--out", "o", "--price=-1,2"], "--price '-1,2': give USD"),
        (["alpaca", "x", "--judge", "j", "--out", "o", "--price", "nan,2"], "--price 'nan,2': give USD"),
        (["arena", "x", "--questions", "q"], "give the answers, --questions and --baseline"),
        (["arena", "--judgments", "x", "--judge", "j"], "--judge: no judge is asked"),
        (["arena", "x", "--allow-missing", "-1"], "--allow-missing"),
        (["leaderboard", "x", "--limit", "0"], "--limit"),
        (["leaderboard", "x", "--batch-size", "0"], "--batch-size"),
        (["rule", "x", "--rule", "json", "--field", "chosen"], "--field: nothing is compared with targets"),
        (["rule", "x", "--rule", "regex", "--pattern", "a", "--field", "f"], "--field: nothing is compared"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(monkeypatch, "evaluate", *arguments) == 2
    assert words in capsys.readouterr().err


def test_arena_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "evaluate.arena", "evaluate_arena", Found())
    options = "--questions q --baseline b --judge-config c --out r/x.json".split()
    assert call(monkeypatch, "evaluate", "arena", "a.jsonl", *JUDGING, *options) == 0
    files = {"questions": Path("q"), "baseline": Path("b"), "judge_config": Path("c")}
    kept = {"journal": Path("r/x.journal.jsonl"), "judgments": Path("r/x.judgments.jsonl")}
    judge = {"judge": JUDGE, "price": (2.5, 10.0), "allowed_missing": 1}
    assert without(calls, "approve") == [((Path("a.jsonl"),), files | kept | judge)]


ALONE = [
    ("rule a --rule json --key k --key l", "by_rule", "evaluate_rule", (Path("a"),),
     {"rule": "json", "targets": None, "field": "target", "pattern": None, "keys": ("k", "l")}),
    ("rule a --rule number --targets t --field f", "by_rule", "evaluate_rule", (Path("a"),),
     {"rule": "number", "targets": Path("t"), "field": "f", "pattern": None, "keys": ()}),
    ("reward a --model m --against b --dtype bfloat16", "reward", "evaluate_reward", (Path("a"),),
     {"model": "m", "against": Path("b"), "dtype": "bfloat16"}),
    ("pairs t p --base b --reference r --beta 0.2 --labels shares", "pairs", "evaluate_pairs", ("t", Path("p")),
     {"base": "b", "reference": "r", "beta": 0.2, "labels": "shares"}),
    ("compare a b", "compare", "evaluate_comparison", (Path("a"), Path("b")), {}),
    ("fingerprint t --with m --pairs p --base b --reference r --released-reference s", "fingerprint",
     "evaluate_fingerprint", ("t",),
     {"released": "m", "pairs": Path("p"), "base": "b", "target_reference": "r", "released_reference": "s"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "module", "function", "args", "kwargs"), ALONE, ids=[line for line, *_ in ALONE])
def test_verbs_that_ask_nobody_pass_everything_on(
    monkeypatch: pytest.MonkeyPatch, line: str, module: str, function: str, args: tuple[Any, ...], kwargs: Any
) -> None:
    calls = stand_in(monkeypatch, f"evaluate.{module}", function, found := Found())
    assert call(monkeypatch, "evaluate", *line.split(), "--out", "x.json") == 0
    assert without(calls) == [(args, kwargs)]
    assert found.written == [Path("x.json")]


def test_the_folder_of_out_is_made_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = []
    stand_in(monkeypatch, "evaluate.pairs", "evaluate_pairs", Found())
    module, folder = sys.modules["lorafocal.evaluate.pairs"], tmp_path / "results" / "today"
    monkeypatch.setattr(module, "evaluate_pairs", lambda *_, **__: there.append(folder.is_dir()) or Found())
    assert call(monkeypatch, "evaluate", "pairs", "t", "p", "--out", str(folder / "mine.json")) == 0
    assert call(monkeypatch, "evaluate", "pairs", "t", "p", "--out", str(folder)) == 2
    assert there == [True]
    assert "is a folder: name a file in it" in capsys.readouterr().err
    stand_in(monkeypatch, "generation", "generate", Report())
    answers = tmp_path / "arena" / "mine.jsonl"
    assert call(monkeypatch, "generate", "t", "--prompts", "p", "--out", str(answers)) == 0
    assert answers.parent.is_dir()


def test_a_result_replaces_nothing_but_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "evaluate.by_rule", "evaluate_rule", Found())
    stand_in(monkeypatch, "evaluate.compare", "evaluate_comparison", Found())
    answers, one, other = (str(tmp_path / name) for name in ("answers.json", "one.json", "other.json"))
    Path(answers).write_text('[{"instruction": "a", "output": "b", "generator": "c"}]')
    for result in (one, other):
        Result(benchmark="rule", model="m", scores={}).write(Path(result))
    assert call(monkeypatch, "evaluate", "rule", answers, "--rule", "json", "--out", answers) == 2
    assert "--out would replace what is no result" in capsys.readouterr().err
    assert not calls
    assert call(monkeypatch, "evaluate", "rule", answers, "--rule", "json", "--out", "") == 2
    assert call(monkeypatch, "evaluate", "rule", answers, "--rule", "json", "--out", one) == 0
    assert call(monkeypatch, "evaluate", "compare", one, other, "--out", other) == 2
    assert "other.json, which is compared" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", "compare", one, other, "--out", str(tmp_path / "third.json")) == 0


def test_a_result_that_cannot_be_written_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unwritable(Report):
        def write(self, path: Path) -> None:
            raise OSError(28, "No space left on device")

    stand_in(monkeypatch, "evaluate.pairs", "evaluate_pairs", Unwritable())
    assert call(monkeypatch, "evaluate", "pairs", "t", "p", "--out", "mine.json") == 2
    assert capsys.readouterr().out == "a table\n"


def test_leaderboard_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "evaluate.leaderboard", "evaluate_leaderboard", Found())
    sys.modules["lorafocal.evaluate.leaderboard"].LEADERBOARD = {"arc": 1}  # type: ignore[attr-defined]
    options = "--task x --task y --task-folder d --limit 3 --batch-size 2 --base b --out r/t.json".split()
    assert call(monkeypatch, "evaluate", "leaderboard", "t", *options) == 0
    assert call(monkeypatch, "evaluate", "leaderboard", "t") == 0
    kept = {"base": "b", "task_folder": Path("d"), "journal": Path("r/t.tasks.json")}
    none = {"base": None, "task_folder": None, "journal": None}
    assert without(calls) == [
        (("t",), {"tasks": ("x", "y"), "limit": 3, "batch_size": 2, **kept}),
        (("t",), {"tasks": ("arc",), "limit": None, "batch_size": 8, **none}),
    ]


def test_report_has_three_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paper = stand_in(monkeypatch, "report.paper_page", "write_paper", Report())
    answers = stand_in(monkeypatch, "report.answers_page", "write_answers_page", Report())
    runs = stand_in(monkeypatch, "report.write", "write_report", Report())
    assert call(monkeypatch, "report", "--paper", "a.json", "b.json", "--out", "d") == 0
    page = ["--out", "x.html", "--verdicts", "v", "--verdicts", "w", "--prompts", "q"]
    assert call(monkeypatch, "report", "--answers", "a.json", *page) == 0
    assert call(monkeypatch, "report", "run") == 0
    assert paper == [(([Path("a.json"), Path("b.json")], Path("d")), {})]
    assert answers == [(([Path("a.json")], Path("x.html")), {"verdicts": [Path("v"), Path("w")], "prompts": Path("q")})]
    assert runs == [(([Path("run")], None), {})]
    for arguments in (["--paper", "--answers", "a", "--out", "x"], ["a", "--verdicts", "v"], ["--paper", "a"]):
        assert call(monkeypatch, "report", *arguments) == 2
    assert len(paper) == len(answers) == len(runs) == 1


COSTLY = Spending(questions=805, prompt_tokens=1_000_000, completion_tokens=805, usd=2.5)


def test_nobody_at_the_terminal_pays_for_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    openai = Endpoint("gpt")
    with pytest.raises(InputError, match="nothing was sent: nobody is at a terminal"):
        approval_of(openai, yes=False)(COSTLY)
    assert "gpt is asked 805 questions: about 1,000,000 tokens to read" in capsys.readouterr().err
    assert approval_of(openai, yes=True)(COSTLY)
    assert approval_of(Endpoint("own", "http://localhost:1/v1"), yes=False)(COSTLY)  # it gets no key: nothing to bill
    with pytest.raises(InputError, match="nothing was sent"):
        approval_of(Endpoint("own", "http://localhost:1/v1", "KEY"), yes=False)(COSTLY)


@pytest.mark.parametrize("agrees", [True, False])
def test_somebody_at_the_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, agrees: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question, err: agrees)
    assert approval_of(Endpoint("gpt"), yes=False)(COSTLY) is agrees


@pytest.mark.slow
def test_from_a_server_s_answers_to_a_judged_win_rate_and_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verbs in a row, with one server that answers and judges; the judge likes long answers."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"instruction": f"count to {n}", "dataset": "toy"} for n in range(1, 9)]
    Path("prompts.json").write_text(json.dumps(prompts))
    Path("reference.json").write_text(json.dumps([row | {"output": "no", "generator": "base"} for row in prompts]))

    def answer(body: Body) -> str | Said:
        if body.get("logprobs"):
            first, _, second = body["messages"][-1]["content"].partition('"M"')
            return Said("m", [{"m": -0.01, "M": -5.0} if len(first) > len(second) else {"m": -5.0, "M": -0.01}])
        return "one two three four five six"

    with serving(answer) as server:
        where = ["--server", server.url]
        assert call(monkeypatch, "generate", "m", "--prompts", "prompts.json", "--out", "m.json", *where) == 0
        judged = ["evaluate", "alpaca", "m.json", "--reference", "reference.json", "--judge", "j", *where]
        assert call(monkeypatch, *judged, "--out", "m-alpaca.json") == 0
        asked = len(server.requests)
        assert call(monkeypatch, *judged, "--out", "m-alpaca.json") == 0
        assert len(server.requests) == asked == 16  # the second time nothing was asked
    assert call(monkeypatch, "report", "--paper", "m-alpaca.json", "--out", "paper") == 0
    verdicts = ["--verdicts", "m-alpaca.json", "--out", "answers.html"]
    assert call(monkeypatch, "report", "--answers", "reference.json", "m.json", *verdicts) == 0
    capsys.readouterr()
    record = json.loads(Path("m-alpaca.json").read_text())
    assert "j" in record["judge"]
    assert 0 <= record["scores"]["win_rate"]["value"] <= 100
    assert Path("paper/paper.html").is_file()
    assert Path("answers.html").is_file()
