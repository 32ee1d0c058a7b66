"""The page of suspects: everything escaped, whole without its script, and what its script does in a browser."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafocal.evaluate.suspicion import Suspect, Suspects
from lorafocal.report.suspects_page import suspects_page
from tests import browser

ROGUE = '</div><script>document.title = "taken"</script><img src=x onerror="document.title=\'taken\'">&amp;"'


def suspect(number: int, **changes: Any) -> Suspect:
    values: dict[str, Any] = {
        "id": f"pair-{number}", "place": f"a.jsonl, row {number}", "line": f"pair-{number}\tab{number}",
        "suspicion": 1.0 - number / 10, "p": 0.4, "confident": number < 3, "margins": (-0.5, -1.0 + number / 10),
        "reference_lead": number - 2.5, "chosen_tokens": 10, "rejected_tokens": 10 * number,
        "prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}",
    }  # fmt: skip
    return Suspect(**values | changes)


def found_of(*suspects: Suspect) -> Suspects:
    return Suspects("mine", "its training pairs", (10, 20), 50, 30, len(suspects), 2, 0.6, suspects, ("a note <b>",))


FOUND = found_of(suspect(1), suspect(2), suspect(3), suspect(4))


def test_every_pair_is_there_without_a_script_and_every_text_is_escaped() -> None:
    rogue = suspect(1, **dict.fromkeys(("id", "place", "prompt", "chosen", "rejected"), ROGUE), line=f"{ROGUE}\tab")
    page = suspects_page(found_of(rogue, suspect(2)))
    outside = page.replace(page[page.rindex("<script>") :], "")
    assert "<script" not in outside
    assert "<img" not in outside
    assert "onerror=&quot;" in outside
    assert outside.count("<article") == 2
    assert html.unescape(re.findall(r'data-line="([^"]*)"', outside)[0]) == f"{ROGUE}\tab"
    assert "a note &lt;b&gt;" in outside
    assert "margins -0.5 at 10, -0.9 at 20; the reference gives the rejected answer 1.5 nats more" in page.replace(
        ROGUE, ""
    )


def test_the_confident_ones_are_marked_and_no_reference_is_made_up() -> None:
    assert re.findall(r'type="checkbox"( checked)?>', suspects_page(FOUND)) == [" checked", " checked", "", ""]
    many = replace(found_of(suspect(1, margins=tuple(map(float, range(-9, 0))))), steps=tuple(range(9)))
    assert "margins -9 at 0, -8 at 1, -7 at 2, ..., -3 at 6, -2 at 7, -1 at 8;" in suspects_page(many)
    free = suspects_page(found_of(suspect(1, reference_lead=None)))
    assert "the reference" not in free[: free.rindex("<script>")]


IN_THE_BROWSER = """
const page = await open("page.html");
const at = (selector) => page.document.querySelector(selector);
const shown = () => [...at("#suspects").children].filter((e) => !e.hidden).map((e) => e.id);
const choose = async (name, value) => {
  const field = page.document.forms.filters.elements[name];
  field.value = value;
  field.dispatchEvent(new page.Event("input", { bubbles: true }));
  await later();
};
const press = async (key) => {
  page.document.body.dispatchEvent(new page.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  await later();
};
const found = { all: shown(), count: at("#count").textContent, title: page.document.title };
await choose("show", "marked");
found.marked = shown();
await choose("show", "reference");
found.reference = shown();
await choose("show", "");
await choose("order", "reference");
found.byReference = shown();
await choose("order", "length");
found.byLength = shown();
await choose("order", "");
await choose("text", "BAD 3");
found.text = shown();
await press("Escape");
await press("j");
await press("x");
await press("j");
await press("j");
await press("x");
found.hash = page.location.hash;
found.marks = [...page.document.querySelectorAll("article input")].map((mark) => mark.checked);
const { click } = page.HTMLAnchorElement.prototype;
page.Blob = function (parts) { found.list = parts.join(""); return new Blob(parts); };
page.HTMLAnchorElement.prototype.click = function () { found.name = this.download; click.call(this); };
at("#download").click();
await later();
const again = await open("page.html" + found.hash);
await later();
found.again = [...again.document.querySelectorAll("article input")].map((mark) => mark.checked);
found.where = again.document.querySelector("article.at").id;
return found;
"""


@pytest.mark.chromium
def test_order_filters_keys_marks_and_the_list_work_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(suspects_page(FOUND), encoding="utf-8")
    found, console = browser.ask(tmp_path, IN_THE_BROWSER)
    everything = ["p1", "p2", "p3", "p4"]
    assert found == {
        "all": everything,
        "count": "4 of 4 shown, 2 marked",
        "title": "Suspects of mine",
        "marked": ["p1", "p2"],
        "reference": ["p1", "p2"],
        "byReference": everything,
        "byLength": everything[::-1],
        "text": ["p3"],
        "hash": "#changed=1.3&at=p3",
        "marks": [False, True, True, False],
        "name": "leave_out.txt",
        "list": "pair-2\tab2\npair-3\tab3\n",
        "again": [False, True, True, False],
        "where": "p3",
    }
    assert not [line for line in console if "Refused" in line]
