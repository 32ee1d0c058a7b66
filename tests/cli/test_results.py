"""Verbs around what was trained: every option is passed on, and none is ignored."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.score import PairScore, ScoreReport
from tests.command import Report, call, stand_in


class Scored(Report):
    def __init__(self) -> None:
        self.written: list[Path] = []

    def write(self, path: Path) -> None:
        self.written.append(path)


def test_score_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "evaluate.score", "score_file", found := Scored())
    asked = ["--base", "b", "--reference", "r", "--beta", "0.2", "--ches", "--out", "x", "--json"]
    assert call(monkeypatch, "score", "adapter", "pairs.jsonl", *asked) == 0
    assert calls == [(("adapter", Path("pairs.jsonl")), {"base": "b", "reference": "r", "beta": 0.2, "ches": True})]
    assert found.written == [Path("x")]
    assert json.loads(capsys.readouterr().out) == {"pairs": 3, "name": "Zoë"}


def test_score_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "evaluate.score", "score_file", Report())
    assert call(monkeypatch, "score", "org/model", "pairs.jsonl") == 0
    assert calls == [
        (("org/model", Path("pairs.jsonl")), {"base": None, "reference": None, "beta": None, "ches": False})
    ]
    assert capsys.readouterr().out == "a table\n"


def test_scores_replace_nothing_but_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rows, metrics and configs that a hasty --out names stay as they are, and nothing is computed."""
    monkeypatch.chdir(tmp_path)
    there = {
        "rows.jsonl": '{"prompt": "p", "chosen": "c", "rejected": "r"}\n',
        "metrics.jsonl": '{"loss": 0.7, "step": 1}\n',
        "config.json": '{\n "a": 1\n}\n',
        "words.txt": "words",
        "more.jsonl": json.dumps(PairScore("a", 1, 1, -1.0, -2.0).as_dict() | {"prompt": "p"}) + "\n",
    }
    for name, text in there.items():
        Path(name).write_text(text)
    os.mkfifo("pipe")
    Path("link").symlink_to("rows.jsonl")
    calls = stand_in(monkeypatch, "evaluate.score", "score_file", found := Scored())
    sys.modules["lorafocal.evaluate.score"].PairScore = PairScore  # type: ignore[attr-defined]
    refusals = dict.fromkeys(there, "--out would replace what it did not write")
    for name, message in (
        refusals | {"pipe": "a device or a pipe", "link": "a symbolic link", ".": "a folder"}
    ).items():
        assert call(monkeypatch, "score", "adapter", "rows.jsonl", "--out", name) == 2
        assert message in capsys.readouterr().err
    assert (calls, found.written) == ([], [])
    assert {name: Path(name).read_text() for name in there} == there
    ScoreReport("m", None, [PairScore("a", 1, 1, -1.0, -2.0)]).write(Path("scores.jsonl"))
    Path("empty").touch()
    for name in ("scores.jsonl", "empty", "deep/new.jsonl"):
        assert call(monkeypatch, "score", "adapter", "rows.jsonl", "--out", name) == 0


def test_scores_that_cannot_be_written_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unwritable(Report):
        def write(self, path: Path) -> None:
            raise OSError(28, "No space left on device")

    stand_in(monkeypatch, "evaluate.score", "score_file", Unwritable())
    assert call(monkeypatch, "score", "adapter", "pairs.jsonl", "--out", "new.jsonl") == 2
    said = capsys.readouterr()
    assert said.out == "a table\n"
    assert "No space left" in said.err


def test_a_report_is_written_where_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `>&-` in a shell."""
    stand_in(monkeypatch, "evaluate.score", "score_file", found := Scored())
    monkeypatch.setattr(sys, "stdout", None)
    assert call(monkeypatch, "score", "adapter", "pairs.jsonl", "--out", "x") == 0
    assert found.written == [Path("x")]


MERGING = (
    "--weights=1,-0.5 --base b --onto original --original o --pairs p --dtype float16 --gate-dtype bfloat16"
    " --max-drift 0.2"
).split()


ASKED = {
    "weights": (1.0, -0.5), "base": "b", "onto": "original", "original": "o", "pairs": Path("p"), "dtype": "float16",
    "gate_dtype": "bfloat16", "max_drift": 0.2,
}  # fmt: skip


UNASKED = {
    "weights": None, "base": None, "onto": "auto", "original": None, "pairs": None, "dtype": None,
    "gate_dtype": "float32",
}  # fmt: skip


@pytest.mark.usefixtures("adapters")
def test_merge_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "release.merge", "merge_adapter", Report())
    assert call(monkeypatch, "merge", "one", "other", "--out", "merged", *MERGING, "--json") == 0
    assert call(monkeypatch, "merge", "one", "--out", "merged") == 0
    assert calls == [
        (([Path("one"), Path("other")], Path("merged")), ASKED),
        (([Path("one")], Path("merged")), UNASKED),
    ]
    assert capsys.readouterr().out.endswith("a table\nmerged model          merged\n")


@pytest.mark.usefixtures("adapters")
def test_export_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    gguf = ["--as", "gguf", "--converter", "convert.py", "--outtype", "q8_0"]
    assert call(monkeypatch, "export", "one", "other", "--out", "x", *gguf, *MERGING, "--json") == 0
    assert call(monkeypatch, "export", "one", "--out", "x") == 0
    converted = {"form": "gguf", "converter": Path("convert.py"), "outtype": "q8_0"}
    assert calls == [
        (([Path("one"), Path("other")], Path("x")), ASKED | converted),
        (([Path("one")], Path("x")), UNASKED | {"form": "bundle", "converter": None, "outtype": None}),
    ]
    assert capsys.readouterr().out.endswith("a table\n")


@pytest.mark.usefixtures("adapters")
def test_export_asks_before_it_pushes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "release.export", "export", Report())
    calls = stand_in(monkeypatch, "release.push", "push", "hub/owner/name")
    destinations: list[Any] = []
    check = lambda repo, *, public: destinations.append((repo, public))  # noqa: E731
    monkeypatch.setattr(sys.modules["lorafocal.release.push"], "check_destination", check, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda question, **_: bool(asked.append(question)))
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name") == 0
    all_of_it = ["--public", "--with-pairs", "--yes", "--json"]
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name", *all_of_it) == 0
    assert destinations == [("owner/name", False), ("owner/name", True)]
    (_, careful), (_, bold) = calls
    assert [arguments for arguments, _ in calls] == [(Path("x"), "owner/name")] * 2
    assert (careful["public"], careful["with_pairs"], bold["public"], bold["with_pairs"]) == (False, False, True, True)
    assert careful["confirm"]("These files?") is False
    assert asked == ["These files?"]
    assert bold["confirm"]("These files?") is True
    said = capsys.readouterr()
    assert "pushed to hub/owner/name" in said.out
    assert "These files?" in said.err


@pytest.mark.parametrize(
    "words", [["--public"], ["--yes"], ["--with-pairs"], ["--outtype", "bf16"], ["--weights", "a"]]
)
@pytest.mark.usefixtures("adapters")
def test_options_of_export_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    assert call(monkeypatch, "export", "one", "--out", "x", *words) == 2
    assert words[0] in capsys.readouterr().err
    assert not calls


@pytest.mark.usefixtures("adapters")
def test_a_push_that_cannot_be_is_refused_before_the_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    stand_in(monkeypatch, "release.push", "check_destination", InputError("nobody is logged in"))
    monkeypatch.setattr(sys.modules["lorafocal.release.push"], "push", None, raising=False)
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name") == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "a/b", "--as", "merged", "--with-pairs") == 2
    assert "--with-pairs goes with --as bundle" in capsys.readouterr().err
    assert not calls


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_places_are_looked_at_before_the_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    loaded = stand_in(monkeypatch, "release.merge", "merge_adapter", Report())
    loaded += stand_in(monkeypatch, "release.export", "export", Report())
    assert call(monkeypatch, verb, "one", "elsewhere", "--out", "x") == 2
    assert "elsewhere: there is no such folder" in capsys.readouterr().err
    assert call(monkeypatch, verb, "one", "--out", "other") == 2
    assert "other exists already" in capsys.readouterr().err
    assert not loaded


def test_chat_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "chat", "chat", None)
    drawing = ["--system", "s", "--max-new-tokens", "5", "--temperature", "0", "--seed", "3", "--base", "b"]
    assert call(monkeypatch, "chat", "runs/a", "--prompt", "one", "--prompt", "two", *drawing) == 0
    assert call(monkeypatch, "chat", "runs/a") == 0
    given = {"base": "b", "prompts": ("one", "two"), "system": "s", "max_new_tokens": 5, "temperature": 0.0, "seed": 3}
    usual = {"base": None, "prompts": (), "system": None, "max_new_tokens": 256, "temperature": 0.7, "seed": 0}
    assert calls == [((Path("runs/a"),), given), ((Path("runs/a"),), usual)]


def test_report_passes_its_runs_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "report.write", "write_report", Report())
    assert call(monkeypatch, "report", "runs/a", "runs/b", "--out", "both") == 0
    assert calls == [(([Path("runs/a"), Path("runs/b")], Path("both")), {})]
    assert capsys.readouterr().out == "a table\n"


def test_the_real_functions_take_what_the_command_gives() -> None:
    """The stand-ins above accept anything, so the signatures are compared with the real ones."""
    import inspect

    from lorafocal.chat import chat
    from lorafocal.evaluate.score import score_file
    from lorafocal.release.export import export
    from lorafocal.release.merge import merge_adapter
    from lorafocal.release.push import push
    from lorafocal.report.check import check_data
    from lorafocal.report.check_page import check_page
    from lorafocal.report.html import write_page
    from lorafocal.report.write import write_report

    inspect.signature(check_data).bind("config")
    inspect.signature(check_page).bind("report")
    inspect.signature(write_page).bind(Path("p"), "page")
    inspect.signature(write_report).bind([Path("a")], None)
    inspect.signature(score_file).bind("adapter", Path("p"), base=None, reference=None, beta=None, out=None)
    inspect.signature(merge_adapter).bind([Path("a")], Path("o"), **ASKED)
    inspect.signature(export).bind([Path("a")], Path("o"), form="gguf", converter=None, outtype=None, **ASKED)
    inspect.signature(push).bind(Path("o"), "owner/name", public=False, with_pairs=False, confirm=print)
    drawing = {"max_new_tokens": 1, "temperature": 0.0, "seed": 0}
    inspect.signature(chat).bind(Path("a"), base=None, prompts=(), system=None, **drawing)
