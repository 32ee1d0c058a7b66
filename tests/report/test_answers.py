"""Answers side by side: matched by their prompt, judged by what a result says of it, on a page that holds only text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.result import Result, Score, file_hashes, prompt_sha256
from lorafocal.report.answers import SideBySide, side_by_side
from lorafocal.report.answers_page import answers_page, write_answers_page
from tests import browser
from tests.parsed_page import Page

FORGED = '"></div></article><script>document.title = "forged"</script><img src=x onerror=alert(1)>&amp;'
PROMPTS = ["Name a colour.", "Name a number.", "Name an animal."]


def answers(path: Path, model: str, outputs: Mapping[str, str], **more: Any) -> Path:
    rows = [{"instruction": prompt, "output": text, "generator": model, **more} for prompt, text in outputs.items()]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def result(path: Path, model: str, items: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    Result("alpaca_eval_2", model, {"win_rate": Score(50.0)}, items=tuple(items), **more).write(path)
    return path


def item(prompt: str, **verdict: Any) -> dict[str, Any]:
    return {"prompt_sha256": prompt_sha256(prompt), **verdict}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    base = answers(tmp_path / "base.json", "base", dict(zip(PROMPTS, ("red", "7", "cat"), strict=True)))
    other = dict(zip(reversed(PROMPTS), ("dog", "7", "blue"), strict=True)) | {"Name a day.": "Monday"}
    return [base, answers(tmp_path / "mine.json", "mine", other, dataset="toy")]


def test_answers_meet_by_their_prompt_in_the_order_of_the_first_file(files: list[Path]) -> None:
    shown = side_by_side(files)
    assert shown.models == ("base", "mine")
    assert [entry.prompt for entry in shown.entries] == [*PROMPTS, "Name a day."]
    assert [entry.answers for entry in shown.entries] == [("red", "blue"), ("7", "7"), ("cat", "dog"), (None, "Monday")]
    assert [entry.differs for entry in shown.entries] == [True, False, True, True]
    assert shown.notes == ("base has no answer to 1 of 4 prompts",)


def test_a_prompt_that_stands_twice_is_matched_in_its_order(tmp_path: Path) -> None:
    rows = [{"instruction": "again", "output": text, "generator": "m"} for text in ("one", "two")]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    verdicts = [item("again", right=True), item("again", right=False)]
    shown = side_by_side([tmp_path / "m.json"], [result(tmp_path / "r.json", "m", verdicts)])
    assert [(entry.answers, entry.verdicts[0].kind) for entry in shown.entries if entry.verdicts[0]] == [
        (("one",), "right"),
        (("two",), "wrong"),
    ]


@pytest.mark.row("58")
@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ({"preference": 0.98}, "preferred", "preferred (0.98)"),
        ({"preference": 0.5}, "tie", "tie (0.50)"),
        ({"preference": 0.0}, "not preferred", "not preferred (0.00)"),
        ({"preference": None}, "no verdict", "no verdict"),
        ({"right": True}, "right", "right"),
        ({"right": False}, "wrong", "wrong"),
        ({"right": None}, "no verdict", "no verdict"),
        ({"score": -1.25}, "scored", "score -1.25"),
        ({"score": 2.0, "score_against": 1.0}, "preferred", "preferred (score 2 against 1)"),
        ({"score": 1.0, "score_against": 1.0}, "tie", "tie (score 1 against 1)"),
        ({"score": None, "score_against": 1.0}, "no verdict", "no verdict"),
    ],
)
def test_a_verdict_is_what_the_item_says_and_none_where_it_says_none(
    files: list[Path], tmp_path: Path, said: Mapping[str, Any], kind: str, text: str
) -> None:
    found = side_by_side(files, [result(tmp_path / "r.json", "mine", [item(PROMPTS[1], **said)])])
    verdicts = [entry.verdicts[0] for entry in found.entries]
    assert [verdict is not None for verdict in verdicts] == [False, True, False, False]
    assert verdicts[1] is not None
    assert (verdicts[1].kind, verdicts[1].text) == (kind, text)
    assert found.judgments[0].model == 1
    assert "mine, alpaca_eval_2: nothing is said of 3 of 4 prompts" in found.notes


def test_a_result_of_a_model_that_is_not_shown_stands_at_the_prompt(files: list[Path], tmp_path: Path) -> None:
    shown = side_by_side(files, [result(tmp_path / "r.json", "third", [item(PROMPTS[0], right=True)], judge="j")])
    assert shown.judgments[0].model is None
    heading = re.search(r"<h2>.*?</h2>", answers_page(shown))
    assert heading is not None
    assert 'title="third, alpaca_eval_2 by j">right</span>' in heading[0]


def test_arena_hard_is_matched_by_question_and_its_prompts_come_from_their_file(tmp_path: Path) -> None:
    line = {
        "question_id": "q1",
        "model_id": "mine",
        "choices": [{"turns": [{"content": "first"}, {"content": "then"}]}],
    }
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    question = {
        "question_id": "q1",
        "category": "c",
        "cluster": "d",
        "turns": [{"content": "Why?"}, {"content": "And?"}],
    }
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    verdict = result(tmp_path / "r.json", "mine", [{"question_id": "q1", "preference": 1.0}])
    bare = side_by_side([tmp_path / "mine.jsonl"], [verdict]).entries[0]
    told = side_by_side([tmp_path / "mine.jsonl"], [verdict], prompts=tmp_path / "question.jsonl").entries[0]
    assert (bare.prompt, told.prompt) == ("question q1", "Why?\n\nAnd?")
    assert told.answers == ("first\n\nthen",)
    assert told.verdicts[0] is not None
    assert told.verdicts[0].kind == "preferred"


def test_two_models_of_one_name_are_told_apart_by_their_files(files: list[Path], tmp_path: Path) -> None:
    twin = answers(tmp_path / "twin.json", "base", {PROMPTS[0]: "green"})
    verdict = result(tmp_path / "r.json", "base", [item(PROMPTS[0], right=True)])
    shown = side_by_side([files[0], twin], [verdict])
    assert shown.models == ("base (base.json)", "base (twin.json)")
    assert shown.judgments[0].model is None
    read = result(tmp_path / "read.json", "base", [item(PROMPTS[0], right=True)], inputs=file_hashes(twin))
    assert side_by_side([files[0], twin], [read]).judgments[0].model == 1


@pytest.mark.row("58")
def test_verdicts_on_other_answers_of_that_name_are_told(files: list[Path], tmp_path: Path) -> None:
    judged = [item(prompt, right=True) for prompt in PROMPTS]
    verdict = result(tmp_path / "r.json", "base", judged, inputs=file_hashes(files[0]))
    assert not any("it read" in note for note in side_by_side(files, [verdict]).notes)
    answers(files[0], "base", dict.fromkeys(PROMPTS, "generated anew"))
    assert side_by_side(files, [verdict]).notes[-1] == (
        "base, alpaca_eval_2: it does not say that it read base.json, so it may be of other answers of that name"
    )


def test_what_cannot_be_shown_is_refused_and_nothing_is_written(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one file"):
        side_by_side([])
    strange = result(tmp_path / "r.json", "mine", [item("something else", right=True)])
    with pytest.raises(InputError, match=r"r\.json says nothing of these prompts \(1 items"):
        side_by_side(files, [strange])
    rows = [{"instruction": prompt, "output": "x", "generator": prompt} for prompt in PROMPTS]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"many\.json holds answers of 3 models"):
        side_by_side([tmp_path / "many.json"])
    with pytest.raises(InputError, match=r"question\.jsonl: these answers hold the texts.*leave --prompts out"):
        side_by_side(files, prompts=tmp_path / "question.jsonl")
    with pytest.raises(InputError, match=r"one \.html file"):
        write_answers_page(files, tmp_path / "page")
    with pytest.raises(InputError, match="does not exist"):
        write_answers_page(files, tmp_path / "absent" / "page.html")
    assert not (tmp_path / "page").exists()


# --- the page -------------------------------------------------------------------------------------------------


def forged(tmp_path: Path) -> SideBySide:
    file = answers(tmp_path / "f.json", FORGED, {FORGED: FORGED, "plain": "\x00 \u2028 \\ `"}, dataset=FORGED)
    verdict = result(tmp_path / "fr.json", FORGED, [item(FORGED, right=True)], judge=FORGED)
    return side_by_side([file], [verdict])


@pytest.mark.row("S2")
def test_texts_are_texts_and_no_script_but_the_pages_own_can_run(tmp_path: Path) -> None:
    page = answers_page(forged(tmp_path))
    elements = Page(page).elements
    assert [tag for tag, _ in elements].count("script") == 1
    assert not {"img", "link", "iframe"} & {tag for tag, _ in elements}
    assert not any(name == "src" or name.startswith("on") for _, attributes in elements for name in attributes)
    policy = next(a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a) or ""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_the_same_files_give_the_same_bytes_and_the_report_counts(files: list[Path], tmp_path: Path) -> None:
    verdict = result(tmp_path / "r.json", "mine", [item(PROMPTS[0], right=True), item(PROMPTS[1], right=False)])
    report = write_answers_page(files, tmp_path / "page.html", verdicts=[verdict])
    first = report.page.read_bytes()
    assert write_answers_page(files, tmp_path / "page.html", verdicts=[verdict]).page.read_bytes() == first
    assert str(tmp_path).encode() not in first
    assert report.as_dict()["differ"] == 3
    assert report.as_dict()["judgments"] == [{"judgment": "mine, alpaca_eval_2", "verdicts": {"right": 1, "wrong": 1}}]
    assert "4 prompts, answered by base, mine" in report.table()


IN_THE_BROWSER = """
const page = await open("page.html");
const at = (id) => page.document.getElementById(id);
const entries = [...page.document.querySelectorAll("article")];
const shown = () => entries.filter((each) => !each.hidden).map((each) => each.id);
const go = async (hash) => { page.location.hash = hash; await later(); return shown(); };
const press = async (key) => {
  page.document.body.dispatchEvent(new page.KeyboardEvent("keydown", { key, bubbles: true })); await later(); };
const found = { all: shown(), count: at("count").textContent, title: page.document.title };
found.text = await go("text=monday");
found.differs = await go("differs=1");
found.wrong = await go("v0=wrong");
found.both = await go("v0=right&differs=1");
found.unknown = await go("v0=strange");
found.none = await go("text=nothing+of+that");
found.link = await go("p3");
found.at = page.document.querySelector(".at").id;
found.top = Math.round(at("p3").getBoundingClientRect().top);
const field = page.document.forms.filters.elements.text;
field.value = "RED"; field.dispatchEvent(new page.Event("input", { bubbles: true })); await later();
found.typed = [shown(), page.location.hash];
await press("Escape"); found.cleared = shown();
await press("k"); await press("k"); found.back = page.document.querySelector(".at").id;
await press("j"); found.next = page.document.querySelector(".at").id;
found.focused = (await press("/"), page.document.activeElement.name);
const hostile = await open("forged.html"); await later();
found.forged = hostile.document.title;
const added = hostile.document.createElement("script");
added.textContent = 'document.title = "forged"'; hostile.document.body.append(added); await later();
found.added = hostile.document.title;
return found;
"""


@pytest.mark.slow
@pytest.mark.chromium
def test_links_filters_and_keys_work_in_a_browser(files: list[Path], tmp_path: Path) -> None:
    long = answers(tmp_path / "long.json", "long", dict.fromkeys(PROMPTS, "word " * 3000))
    verdict = result(tmp_path / "r.json", "mine", [item(PROMPTS[0], right=True), item(PROMPTS[1], right=False)])
    site = tmp_path / "site"
    site.mkdir()
    write_answers_page([*files, long], site / "page.html", verdicts=[verdict])
    shown = forged(tmp_path)
    (site / "forged.html").write_text(answers_page(replace(shown, models=("plain",))), encoding="utf-8")
    found, console = browser.ask(site, IN_THE_BROWSER)
    everything = ["p1", "p2", "p3", "p4"]
    assert found == {
        "all": everything,
        "count": "4 of 4 prompts",
        "title": "Answers of base, mine, long",
        "text": ["p4"],
        "differs": everything,
        "wrong": ["p2"],
        "both": ["p1"],
        "unknown": everything,
        "none": [],
        "link": everything,
        "at": "p3",
        "top": found["top"],
        "typed": [["p1"], "#text=RED&at=p3"],
        "cleared": everything,
        "back": "p1",
        "next": "p2",
        "focused": "text",
        "forged": "Answers of plain",
        "added": "Answers of plain",
    }
    assert 0 <= found["top"] < 120  # below the bar, although the answers above are long
    assert len(console) == 1  # the script that the test itself added, and that the policy stopped
    assert "Content Security Policy" in console[0]
