"""The findings of `lorafocal check` as one self-contained web page."""

from __future__ import annotations

from collections.abc import Container, Iterable
from html import escape

from lorafocal.data.prepare import listed
from lorafocal.report import html
from lorafocal.report.check import PADDED_BATCH, CheckReport, PartCheck, ShownPair, source_text

NOTHING = "Nothing stood out. Looked for: answers told apart by length, tied or swapped scores, answers that were cut."
_STYLE = """
.scroll { margin: 0 0 1.4rem; }
.pair { max-width: 60rem; padding: .8rem 1rem; background: var(--card); white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.7 ui-monospace, monospace; }
.pair span { border-radius: .2rem; } .pair .scored { background: #0f766e33; box-shadow: inset -1px 0 var(--line); }
.pair .rejected { background: #b4530933; }
@media print { .pair span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def check_page(report: CheckReport) -> str:
    """The whole page as text."""
    title = f"Data check: {report.config}"
    notes = html.section("To think about", html.items(report.notes) or html.paragraph(NOTHING))
    body = [f"<h1>{escape(title)}</h1>", notes, *map(part_section, report.parts), pair_section(report.pair)]
    return html.document(title, "\n".join(body), style=_STYLE)


def part_section(part: PartCheck) -> str:
    """What was read, left out, and how long it is."""
    read = ", ".join(map(source_text, part.sources))
    total = part.pairs + part.left_out
    used = f"{part.pairs:,} of {total:,} pairs are used, from {read}."
    drops = [
        [drop.reason, f"{drop.count:,}", f"{drop.count / total:.1%}", listed(drop.examples), drop.remedy]
        for drop in part.drops
    ]
    head = ["left out", "pairs", "share", "the first of them", "why, and what to do"]
    columns = list(next(iter(part.lengths.values())))
    lengths = [[side, *(f"{values[name]:,.0f}" for name in columns)] for side, values in part.lengths.items()]
    return html.section(
        {"train": "Training pairs", "eval": "Held-out pairs"}[part.name],
        html.paragraph(used),
        html.table(head, drops, numbers=False) if drops else html.paragraph("Nothing was left out."),
        html.table(["tokens", *columns], lengths, caption="Mean and quantiles"),
        html.table(["", ""], measures(part)),
    )


def measures(part: PartCheck) -> list[list[str]]:
    """One line a finding: words and number."""
    saved, bias = part.savings, part.bias
    lines = [
        ["chosen answer is the longer one", f"{bias.chosen_longer:.1%}"],
        ["answers of equal length", f"{bias.equal:.1%}"],
        ["chosen minus rejected, mean", f"{bias.mean_difference:+.1f} tokens"],
        ["steps in one epoch", f"{saved.steps:,}"],
        ["packs in one epoch", f"{saved.packs:,}"],
        ["token rows in one epoch", f"{saved.packed:,}"],
        ["saved by shared prompts", f"{saved.sharing:.1%}"],
        [f"saved against padded batches of {PADDED_BATCH} pairs", f"{saved.total:.1%}"],
        ["pairs cut to fit", f"{part.cut:,}"],
        ["prompts whose last token would merge with an answer's first", f"{part.seam_merges:,}"],
    ]
    if part.scores.scored:
        lines += [
            ["pairs with scores", f"{part.scores.scored:,}"],
            ["scores tied", f"{part.scores.ties:,}"],
            ["chosen scored below rejected", f"{part.scores.inversions:,}"],
        ]
    return lines


def pair_section(pair: ShownPair) -> str:
    """One pair as the model reads it, the scored tokens marked one by one."""
    prompt = shown("".join(pair.prompt))
    answers = [
        f'<div class="pair">{prompt}{marked(tokens, kind, context)}</div>'
        for tokens, kind, context in (
            (pair.chosen, "scored", pair.chosen_context),
            (pair.rejected, "scored rejected", pair.rejected_context),
        )
    ]
    return html.section(
        "One pair as the model reads it",
        html.paragraph(f"{pair.id}. Marked tokens are scored; the prompt in front of them is computed once for both."),
        "<h3>Chosen</h3>",
        answers[0],
        "<h3>Rejected</h3>",
        answers[1],
    )


def marked(tokens: Iterable[str], kind: str, context: Container[int] = ()) -> str:
    """Each token in a mark of its own, but those at the places of `context`."""
    return "".join(
        shown(token) if place in context else f'<span class="{kind}">{shown(token)}</span>'
        for place, token in enumerate(tokens)
    )


def shown(token: str) -> str:
    """A token's text, line feeds made visible."""
    return escape(token).replace("\n", "⏎\n")
