"""The page of `lorafocal suspects`: read the pairs, mark some, download the list; one file, no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lorafocal.evaluate.suspicion import Suspect, Suspects, summary
from lorafocal.report import html
from lorafocal.report.answers_page import STYLE

_SCRIPT = Path(__file__).with_name("suspects.js")
_STYLE = """
.answers section.preferred { box-shadow: inset 0 .2rem var(--warn); }
h2 label { font-weight: normal; font-size: .9rem; margin-left: .8rem; white-space: nowrap; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  padding: .15rem .6rem; cursor: pointer; }
"""
_MOST_MARGINS = 6  # of the states, on the page
_HOW = (
    "Marked are the confident ones. Keys: j and k to the next and the previous pair, x to mark or unmark it, / to look"
    " for words, Escape for all. Marks are kept in the address of the page. The list that you download is for your"
    " config: data.leave_out: leave_out.txt"
)


def suspects_page(found: Suspects) -> str:
    """The whole page. Every pair is there without a script too; the script sorts, filters, moves and marks."""
    title = f"Suspects of {found.run}"
    entries = "\n".join(_article(number, suspect, found) for number, suspect in enumerate(found.found, start=1))
    body = [
        f"<h1>{escape(title)}</h1>",
        *(html.paragraph(line) for line in summary(found)),
        html.items(found.notes),
        html.paragraph(_HOW, soft=True),
        _filters(found),
        f'<div id="suspects">\n{entries}\n</div>',
    ]
    script = _SCRIPT.read_text(encoding="utf-8")
    return html.document(title, "\n".join(part for part in body if part), style=STYLE + _STYLE, script=script)


def _filters(found: Suspects) -> str:
    compared = any(suspect.reference_lead is not None for suspect in found.found)
    reference = '<option value="reference">the reference prefers the rejected one</option>' if compared else ""
    by_reference = '<option value="reference">the reference\'s lead for the rejected one</option>' if compared else ""
    return (
        '<form id="filters" name="filters" hidden>'
        '<input type="search" name="text" placeholder="words in prompt or answers" aria-label="words">'
        '<label>show <select name="show"><option value="">all</option><option value="marked">marked</option>'
        f'<option value="unmarked">unmarked</option>{reference}</select></label>'
        '<label>order <select name="order"><option value="">most suspicious first</option>'
        f'{by_reference}<option value="length">longest rejected answer first</option></select></label>'
        '<button type="button" id="download">Download the marked ones</button>'
        f'<output id="count">{len(found.found)} pairs</output></form>'
    )


def _article(number: int, suspect: Suspect, found: Suspects) -> str:
    """One pair: its numbers, the prompt, and the answers side by side as they are labelled."""
    lead = suspect.reference_lead
    data = {
        "line": suspect.line,
        "suspicion": f"{suspect.suspicion:.9g}",
        "longer": str(suspect.chosen_tokens - suspect.rejected_tokens),
        "lead": "0" if lead is None else f"{lead:.9g}",
    }
    attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    marked = " checked" if suspect.confident else ""
    chosen = _answer("labelled better", suspect.chosen, suspect.chosen_tokens)
    rejected = _answer(
        "labelled worse, rewarded more by the run", suspect.rejected, suspect.rejected_tokens, "preferred"
    )
    return (
        f'<article id="p{number}"{attributes}>\n<h2><a href="#p{number}">{number}</a> {escape(suspect.id)}'
        f'<label><input type="checkbox"{marked}> leave out</label></h2>\n'
        f'<p class="soft">{escape(_numbers(suspect, found))}</p>\n'
        f'<div class="text prompt">{escape(suspect.prompt)}</div>\n<div class="answers">\n'
        f"{chosen}\n{rejected}\n</div>\n</article>"
    )


def _answer(title: str, text: str, tokens: int, kind: str = "") -> str:
    return (
        f'<section class="{kind}"><h3>{escape(title)} <span class="mark">{tokens} tokens</span></h3>'
        f'<div class="text">{escape(text)}</div></section>'
    )


def _numbers(suspect: Suspect, found: Suspects) -> str:
    margins = [f"{margin:+.3g} at {step}" for step, margin in zip(found.steps, suspect.margins, strict=True)]
    if len(margins) > _MOST_MARGINS:
        margins = [*margins[: _MOST_MARGINS // 2], "...", *margins[-_MOST_MARGINS // 2 :]]
    said = [f"suspicion {suspect.suspicion:.3f} nats (p {suspect.p:.3f})", f"margins {', '.join(margins)}"]
    if suspect.reference_lead is not None:
        side = "chosen" if suspect.reference_lead > 0 else "rejected"
        said.append(f"the reference gives the {side} answer {abs(suspect.reference_lead):.1f} nats more")
    return "; ".join([*said, *([suspect.place] if suspect.place != suspect.id else [])])
