"""A report is complete or absent, holds together as a page, and shows what it was given as text."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from lorafocal.errors import InputError
from lorafocal.report import write
from lorafocal.report.panels import PANELS, drawable
from lorafocal.report.write import write_report
from tests.parsed_page import Page
from tests.written_run import evaluation_line, pairs, training_line, write_run

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FORGED = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is one pixel: drawing takes most of the time, and has tests of its own."""
    for name in ("panel_png", "overview_png"):
        monkeypatch.setattr(write, name, lambda *_: PIXEL)
    monkeypatch.setattr(write, "margins_png", lambda record, *_: PIXEL if record.tables else None)


pytestmark = pytest.mark.usefixtures("undrawn")


def page_of(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_report_with_its_real_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    summary = write_report([write_run(tmp_path / "a")])
    assert all(picture.stat().st_size > 10_000 for picture in summary.pictures)
    assert page_of(summary.page.parent).count("img") == len(drawable(summary.records)) + 1 == len(PANELS)


def test_one_run_is_reported_in_its_own_folder_again_and_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for _ in range(2):
        summary = write_report([run])
    assert sorted(path.name for path in (run / "report").iterdir()) == ["curves.png", "margins-1.png", "report.html"]
    assert summary.page == run / "report" / "report.html"
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    write_report(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"objective.beta": 0.3})], tmp_path / "out"
    )
    page = page_of(tmp_path / "out")
    assert page.elements[0] == ("html", {"lang": "en"})
    assert page.count("title") == page.count("h1") == 1
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert page.count("table") >= 5
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:image/png;base64,")
        if tag == "img":
            assert attributes["alt"]
            assert base64.b64decode((attributes["src"] or "").partition(",")[2]).startswith(b"\x89PNG")
    style = (tmp_path / "out" / "report.html").read_text()
    assert "http://" not in style
    assert "https://" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert 'name="viewport"' in style


def test_the_legend_stands_once_and_names_every_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    write_report(runs, tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert [a["class"] for tag, a in page.elements if tag == "span"] == ["run-0", "run-1", "run-2"]
    write_report(runs[:1], tmp_path / "one")
    assert page_of(tmp_path / "one").count("span") == 0


def test_what_a_user_wrote_stays_text(tmp_path: Path) -> None:
    """Names of folders, settings, drop reasons, versions: none of them becomes part of the page."""
    name = FORGED.replace("/", "∕")
    run = write_run(tmp_path / name, config={"training.note": FORGED, "model.name": FORGED})
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["versions"][FORGED] = FORGED
    manifest["data"]["train"] = {"sources": [{"name": FORGED}], "left_out": {FORGED: 1}, "pairs": FORGED}
    manifest["hardware"] = FORGED
    (run / "manifest.json").write_text(json.dumps(manifest))
    write_report([run, write_run(tmp_path / "b")], tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert page.count("script") == 0
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.text.count("<script>alert(1)") >= 5
    assert {tag for tag, _ in page.elements if tag == "img"} == {"img"}
    assert all((a["src"] or "").startswith("data:") for tag, a in page.elements if tag == "img")


def test_places_of_this_machine_are_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", tables={})
    summary = write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "/home/somebody" not in text
    assert "…/base" in text
    assert str(tmp_path) not in text
    assert "report.html" in summary.table()


def test_settings_that_differ_and_data_are_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"training.learning_rate": 0.002})]
    write_report(runs, tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert "training.learning_rate0.00010.002" in text.replace(" ", "")
    assert "train.jsonl (standard, 85 pairs)" in text
    assert "too_long: 5" in text


def test_plain_words_and_flips_are_on_the_page_and_in_the_summary(tmp_path: Path) -> None:
    tables = {10: pairs(chosen=[-3.0, -3.0], rejected=[-9.0, -9.0])}
    summary = write_report([write_run(tmp_path / "a", tables=tables)])
    page = page_of(tmp_path / "a" / "report")
    for text in (page.text, summary.table()):
        assert "became less likely, by 3.0 nats on average" in text
    assert "right by the reference, right now" in page.text
    [run] = summary.as_dict()["runs"]
    assert run["numbers"]["chosen_displacement"] == pytest.approx(-3.0)
    assert len(run["words"]) == 1
    assert run["flips"][0]["pairs"] == 2
    json.dumps(summary.as_dict(), allow_nan=False)


def test_a_run_in_progress_is_shown_with_what_is_missing(tmp_path: Path) -> None:
    line = training_line(1)
    for key in ("pairs_per_s", "peak_gib"):
        del line[key]
    run = write_run(tmp_path / "a", [line], {}, finished=False, manifest=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"lo')
    text = page_of(write_report([run]).page.parent).text
    for words in ("still going on", "not whole", "no manifest.json", "no histogram", "pairs_per_s", "peak_gib"):
        assert words in text


def test_an_sft_run_is_shown_without_margins(tmp_path: Path) -> None:
    lines = [{"loss": 2.0 - step / 10, "logps/chosen": -20.0, "eval_loss": 2.0, "step": step} for step in (1, 2, 3)]
    config = {"objective.name": "sft", "objective.beta": None, "objective.gamma": None}
    summary = write_report([write_run(tmp_path / "a", lines, {}, config=config)])
    assert "margin" not in summary.as_dict()["runs"][0]["numbers"]
    assert len(summary.pictures) == 1


def test_several_runs_need_a_place(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(InputError, match="--out"):
        write_report(runs)


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "a"), tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write_report([run], out)
    with pytest.raises(InputError, match="is a file"):
        write_report([run], out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "years"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report([write_run(tmp_path / "a")], tmp_path / "file" / "out")


def test_wrong_input_and_a_crash_leave_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "a"), tmp_path / "out"
    write_report([run], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError):
        write_report([tmp_path / "none"], out)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_report([run], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_only_files_of_a_report_count_as_one(tmp_path: Path) -> None:
    summary = write_report([write_run(tmp_path / "a")])
    assert all(re.fullmatch(write._OURS, path.name) for path in summary.page.parent.iterdir())


def test_text_that_is_no_text_does_not_end_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config={"training.note": "\ud800"})
    assert "?" in page_of(write_report([run]).page.parent).text


def test_evaluations_between_training_lines_are_drawn(tmp_path: Path) -> None:
    lines = [training_line(1), evaluation_line(0), evaluation_line(10), training_line(10)]
    assert len(write_report([write_run(tmp_path / "a", lines)]).pictures) == 2
