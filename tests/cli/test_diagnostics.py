"""Verbs that look into a run: every option is passed on, and none is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Report, call, stand_in


def test_advise_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "report.advice", "advise", Report())
    assert call(monkeypatch, "advise", "runs/a", "runs/b", "--gammas", "0.1,0.3") == 0
    assert call(monkeypatch, "advise", "runs/a") == 0
    assert calls == [(([Path("runs/a"), Path("runs/b")],), {"gammas": (0.1, 0.3)}), (([Path("runs/a")],), {})]
    assert call(monkeypatch, "advise", "runs/a", "--gammas", "0.1,much") == 2
    assert "--gammas '0.1,much'" in capsys.readouterr().err


def test_explain_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = stand_in(monkeypatch, "report.explain", "explain", Report())
    monkeypatch.chdir(tmp_path)
    asked = "--pair p1 --pairs f --base b --reference r --out deep/page.html".split()
    assert call(monkeypatch, "explain", "runs/a", *asked) == 0
    assert calls == [
        (("runs/a", "p1"), {"pairs": Path("f"), "base": "b", "reference": "r", "out": Path("deep/page.html")})
    ]
    assert capsys.readouterr().out.splitlines() == ["a table", "", "page       deep/page.html"]


def test_suspects_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = stand_in(monkeypatch, "evaluate.suspects", "find_suspects", Report())
    monkeypatch.chdir(tmp_path)
    asked = "--pairs f --base b --reference r --limit 7 --out page.html --write deep/list".split()
    assert call(monkeypatch, "suspects", "runs/a", *asked) == 0
    (run,), given = calls[0]
    given.pop("say")("so far")
    assert run == Path("runs/a")
    places = {"pairs": Path("f"), "out": Path("page.html"), "write": Path("deep/list")}
    assert given == {"base": "b", "reference": "r", "limit": 7, **places}
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a table\n", "so far\n")


def test_what_explain_and_suspects_write_replaces_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, written = Path("rows.jsonl"), Path("list.txt")
    rows.write_text('{"prompt": "p"}\n')
    written.write_text("rows.jsonl:1\t0123456789abcdef\n")
    stand_in(monkeypatch, "report.explain", "explain", Report())
    calls = stand_in(monkeypatch, "evaluate.suspects", "find_suspects", Report())
    for asked, message in [
        ("explain runs/a --pair p --out rows.jsonl", "rows.jsonl: the page is one .html file"),
        ("suspects runs/a --out rows.jsonl", "rows.jsonl: the page is one .html file"),
        ("suspects runs/a --write rows.jsonl", "--write would replace what it did not write: rows.jsonl"),
        ("suspects runs/a --write .", ". is a folder: name a file in it"),
    ]:
        assert call(monkeypatch, *asked.split()) == 2
        assert message in capsys.readouterr().err
    assert not calls
    assert rows.read_text() == '{"prompt": "p"}\n'
    assert call(monkeypatch, "suspects", "runs/a", "--write", "list.txt") == 0  # its own list again
