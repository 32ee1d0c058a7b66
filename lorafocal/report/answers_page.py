"""`lorafocal report --answers`: a page to read several models' answers on, one file, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lorafocal.report import html
from lorafocal.report.answers import Entry, SideBySide, Verdict, side_by_side

_SCRIPT = Path(__file__).with_name("answers.js")
STYLE = """
body { max-width: none; padding-top: 0; }
form { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center;
  padding: .6rem 0; background: var(--back); border-bottom: 1px solid var(--line); }
@media (min-width: 60rem) { form { position: sticky; top: 0; z-index: 1; } }
form[hidden], article[hidden] { display: none; }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .3rem; padding: .15rem .4rem; max-width: 100%; } input[type=search] { width: 18rem; }
article { content-visibility: auto; contain-intrinsic-size: auto 40rem; scroll-margin-top: 4rem; padding: 1rem 0 1.5rem;
  border-bottom: 1px solid var(--line); }
article h2 { margin: 0 0 .5rem; font-size: 1rem; } h2 a { color: inherit; }
article.at { box-shadow: inset .25rem 0 var(--warn); padding-left: .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .prompt { max-width: 60rem; margin-bottom: 1rem; }
.answers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.answers section { background: var(--card); border-radius: .4rem; padding: .6rem .9rem; }
.answers h3 { margin: 0 0 .4rem; }
.mark { font-weight: normal; font-size: .85rem; border: 1px solid currentColor; border-radius: .3rem; padding: 0 .35rem;
  color: var(--soft); white-space: nowrap; }
.mark.good { color: light-dark(#00704f, #2fc795); } .mark.bad { color: var(--warn); }
@media print { form { display: none; } article { content-visibility: visible; } }
"""
_GOOD, _BAD = ("preferred", "right"), ("not preferred", "wrong")


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """What was put side by side, and the page."""

    shown: SideBySide
    page: Path

    def table(self) -> str:
        """Models, prompts, each judgment's verdicts, what was missing, and where the page is."""
        lines = [f"{len(self.shown.entries)} prompts, answered by {', '.join(self.shown.models)}"]
        lines += [f"{each['judgment']}: {_counted(each['verdicts'])}" for each in self.as_dict()["judgments"]]
        return "\n".join([*lines, *(f"note: {note}" for note in self.shown.notes), f"page     {self.page}"])

    def as_dict(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "page": str(self.page),
            "models": list(self.shown.models),
            "prompts": len(self.shown.entries),
            "differ": sum(entry.differs for entry in self.shown.entries),
            "judgments": [
                {"judgment": judgment.name, "verdicts": dict(_kinds(self.shown, number))}
                for number, judgment in enumerate(self.shown.judgments)
            ],
            "notes": list(self.shown.notes),
        }


def write_answers_page(
    answers: Sequence[Path], out: Path, *, verdicts: Sequence[Path] = (), prompts: Path | None = None
) -> AnswersReport:
    """Write the page of these files (see `side_by_side`); complete or not at all.

    Raises InputError where `out` cannot be written, or is none of a page's names.
    """
    target = Path(out)
    html.check_place(target)
    shown = side_by_side(answers, verdicts, prompts=prompts)
    html.write_page(target, answers_page(shown))
    return AnswersReport(shown, target)


def answers_page(shown: SideBySide) -> str:
    """The whole page. Every prompt is there without a script too; the script filters and moves."""
    title = f"Answers of {', '.join(shown.models)}"
    notes = html.items(shown.notes)
    keys = html.paragraph(
        "Keys: j and k to the next and the previous prompt, / to look for words, Escape for all.", soft=True
    )
    entries = (_article(number, entry, shown) for number, entry in enumerate(shown.entries, start=1))
    body = [f"<h1>{escape(title)}</h1>", notes, keys, _filters(shown), *entries]
    script = _SCRIPT.read_text(encoding="utf-8")
    return html.document(title, "\n".join(part for part in body if part), style=STYLE, script=script)


def _filters(shown: SideBySide) -> str:
    choices = "".join(_choice(number, judgment.name, shown) for number, judgment in enumerate(shown.judgments))
    return (
        '<form id="filters" name="filters" hidden>'
        '<input type="search" name="text" placeholder="words in prompt or answers" aria-label="words">'
        f'{choices}<label><input type="checkbox" name="differs"> answers differ</label>'
        f'<output id="count">{len(shown.entries)} prompts</output></form>'
    )


def _choice(number: int, name: str, shown: SideBySide) -> str:
    kinds = "".join(
        f'<option value="{escape(kind)}">{escape(kind)} ({count})</option>' for kind, count in _kinds(shown, number)
    )
    return f'<label>{escape(name)} <select name="v{number}"><option value="">all</option>{kinds}</select></label>'


def _kinds(shown: SideBySide, number: int) -> list[tuple[str, int]]:
    """How often a judgment said what, the most frequent first."""
    said = (entry.verdicts[number] for entry in shown.entries)
    return Counter(verdict.kind for verdict in said if verdict is not None).most_common()


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.items())


def _article(number: int, entry: Entry, shown: SideBySide) -> str:
    """One prompt, and its answers side by side."""
    kinds = "|".join("" if verdict is None else verdict.kind for verdict in entry.verdicts)
    group = "" if entry.group is None else f' <span class="soft">{escape(entry.group)}</span>'
    apart = "".join(
        f" {_mark(verdict, judgment.name)}"
        for judgment, verdict in zip(shown.judgments, entry.verdicts, strict=True)
        if judgment.model is None and verdict is not None
    )
    return (
        f'<article id="p{number}" data-verdicts="{escape(kinds)}"{" data-differs" if entry.differs else ""}>\n'
        f'<h2><a href="#p{number}">{number}</a>{group}{apart}</h2>\n'
        f'<div class="text prompt">{escape(entry.prompt)}</div>\n<div class="answers">\n'
        + "\n".join(_answers(entry, shown))
        + "\n</div>\n</article>"
    )


def _answers(entry: Entry, shown: SideBySide) -> Iterator[str]:
    for number, (model, text) in enumerate(zip(shown.models, entry.answers, strict=True)):
        marks = "".join(
            f" {_mark(verdict, judgment.name)}"
            for judgment, verdict in zip(shown.judgments, entry.verdicts, strict=True)
            if judgment.model == number and verdict is not None
        )
        said = '<p class="soft">no answer</p>' if text is None else f'<div class="text">{escape(text)}</div>'
        same = ' <span class="soft">the same as the first</span>' if number and text == entry.answers[0] else ""
        yield f"<section><h3>{escape(model)}{marks}{same}</h3>{said}</section>"


def _mark(verdict: Verdict, judgment: str) -> str:
    kind = " good" if verdict.kind in _GOOD else " bad" if verdict.kind in _BAD else ""
    return f'<span class="mark{kind}" title="{escape(judgment)}">{escape(verdict.text)}</span>'
