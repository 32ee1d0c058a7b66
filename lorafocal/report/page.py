"""The HTML page of one or several runs, from their records and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorafocal.report import html
from lorafocal.report.numbers import HEADLINES, flips, headline, is_finite, own_weights, parts, settings
from lorafocal.report.plots import DARK, LIGHT, Theme, run_colours
from lorafocal.report.provenance import NOTHING, deviations, made_of, mapping, recipe_of, value_text
from lorafocal.report.read import RunRecord
from lorafocal.report.words import RULES, Remark, comparison_remarks, remarks

_GROUPS = {
    (True, True): "right by the reference, right now",
    (True, False): "right by the reference, wrong now",
    (False, True): "wrong by the reference, right now",
    (False, False): "wrong by the reference, wrong now",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in both themes, with words for who cannot see it."""

    light: bytes
    dark: bytes
    description: str


def page(records: Sequence[RunRecord], curves: Sequence[Picture], margins: Sequence[Picture]) -> str:
    """The whole page as text."""
    title = "Run report: " + ", ".join(record.name for record in records)
    return html.document(
        title,
        "\n".join(
            [
                f"<h1>{escape(title)}</h1>",
                _legend(records),
                html.section("In plain words", _words(records)),
                html.section("Numbers", _numbers(records)),
                html.section("Curves", _pictures(curves)),
                html.section("Margins of held-out pairs", _margins_words(margins), _pictures(margins)),
                html.section("Flips", *_flips(records)),
                html.section("Provenance", *_provenance(records)),
                html.section("Settings", _settings(records)),
                html.section("Data", _data(records)),
                html.section("Versions", _versions(records)),
                html.section("What is missing", _missing(records)),
            ]
        ),
        style=_run_style(len(records)),
    )


def number_text(value: float | None, form: str) -> str:
    """A number as the tables show it."""
    if value is None:
        return "–"
    return format(value, form) if is_finite(value) else "not finite"


def _legend(records: Sequence[RunRecord]) -> str:
    """Which colour is which run, on every picture of the page; once."""
    if len(records) == 1:
        return ""
    lines = "\n".join(
        f'<li><span class="run-{number}"></span>{escape(record.name)}</li>' for number, record in enumerate(records)
    )
    return f'<ul class="legend" aria-label="Colours of the runs">\n{lines}\n</ul>'


def _run_style(count: int) -> str:
    """The colours of the legend in both themes, as CSS."""

    def rules(theme: Theme) -> str:
        colours = enumerate(run_colours(count, theme))
        return " ".join(f".run-{number} {{ background: {colour}; }}" for number, colour in colours)

    return f"{rules(LIGHT)}\n@media screen and (prefers-color-scheme: dark) {{ {rules(DARK)} }}\n"


def _words(records: Sequence[RunRecord]) -> str:
    parts = [_remark(remark, "") for remark in comparison_remarks(records)]
    for record in records:
        name = record.name if len(records) > 1 else ""
        found = remarks(record)
        parts += [_remark(remark, name) for remark in found]
        if not found:
            parts.append(html.paragraph(f"{name + ': ' if name else ''}nothing that was looked for was found."))
    return "\n".join([*parts, html.paragraph("Looked for: " + "; ".join(RULES) + ".", soft=True)])


def _remark(remark: Remark, name: str) -> str:
    head = f"<strong>{escape(name)}:</strong> " if name else ""
    return (
        f'<div class="remark">\n<p>{head}<strong>{escape(remark.seen)}</strong></p>\n<p>{escape(remark.means)}</p>\n'
        f"<p>{escape(remark.do)}</p>\n</div>"
    )


def _numbers(records: Sequence[RunRecord]) -> str:
    values = [headline(record) for record in records]
    rows = [
        [line.words, *(number_text(run.get(line.key), line.format) for run in values)]
        for line in HEADLINES
        if any(line.key in run for run in values)
    ]
    return html.table(
        ["", *(record.name for record in records)], rows, caption="At the end of each run, if not said otherwise"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    shown = "\n".join(
        html.picture(picture.light, picture.dark, description=picture.description) for picture in pictures
    )
    return f'<div class="grid">\n{shown}\n</div>' if shown else ""


def _margins_words(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    return html.paragraph(
        "Above: how much a pair weighs in the gradient, over its margin (beta times the difference of the two"
        " log-ratios). Below: where the pairs were. Where the two curves agree, the objective and DPO do the same.",
        soft=True,
    )


def _flips(records: Sequence[RunRecord]) -> list[str]:
    tables = [_flip_table(record) for record in records if flips(record)]
    tables += [_parts_table(record) for record in records if parts(record)]
    if not tables:
        return []
    note = html.paragraph(
        "Rankings are by log-prob: right is chosen above rejected, by the reference and by the policy itself. FocalPO"
        " means to gain on pairs that are right already, and to spend little on hopeless ones: compare the margins, and"
        " the two shares of gradient weight. Reward accuracy counts margins above 0 and not rankings: of pairs that the"
        " reference ranks wrong it is often high while few are ranked right.",
        soft=True,
    )
    return [note, *tables]


def _flip_table(record: RunRecord) -> str:
    own = own_weights(record)
    rows = [
        [
            _GROUPS[flip.initially_right, flip.finally_right],
            f"{flip.pairs:,}",
            f"{flip.share:.1%}",
            number_text(flip.mean_margin, "+.3f"),
            *([number_text(flip.own_weight_share, ".1%")] if own else []),
            number_text(flip.dpo_weight_share, ".1%"),
        ]
        for flip in flips(record)
    ]
    head = [
        "held-out pairs",
        "pairs",
        "share",
        "mean margin gained",
        *([f"gradient weight, {own.name}"] if own else []),
        "gradient weight, DPO",
    ]
    return html.table(head, rows, caption=f"{record.name}, after step {record.tables[-1].step}")


def _parts_table(record: RunRecord) -> str:
    rows = [
        [
            "right by the reference" if part.initially_right else "wrong by the reference",
            f"{part.pairs:,}",
            f"{part.finally_right:.1%}",
            number_text(part.accuracy, ".1%"),
            number_text(part.chosen_displacement, "+.2f"),
            number_text(part.rejected_displacement, "+.2f"),
        ]
        for part in parts(record)
    ]
    head = ["held-out pairs", "pairs", "right now", "reward accuracy", "chosen moved (nats)", "rejected moved (nats)"]
    return html.table(
        head, rows, caption=f"{record.name}, after step {record.tables[-1].step}, by what was right before"
    )


def _provenance(records: Sequence[RunRecord]) -> list[str]:
    """What each run does otherwise than its recipe, openly; what went into it, folded."""
    parts = [
        html.table(
            ["otherwise", "recipe", "here", "where the recipe's is from"],
            [[*one] for one in deviations(record)],
            caption=f"{record.name}, against the recipe {recipe_of(record)}",
            numbers=False,
        )
        for record in records
        if deviations(record)
    ]
    exact = [record.name for record in records if recipe_of(record) is not None and not deviations(record)]
    if exact:
        parts.append(html.paragraph(f"Exactly as the recipe says: {', '.join(exact)}."))
    made = [made_of(record) for record in records]
    names = list(dict.fromkeys(name for found in made for name in found))
    if names:
        rows = [[name, *(found.get(name, NOTHING) for found in made)] for name in names]
        shown = html.table(["", *(record.name for record in records)], rows, numbers=False)
        parts.append(html.folded("What the runs were made of" if len(records) > 1 else "What it was made of", shown))
    return parts


def _settings(records: Sequence[RunRecord]) -> str:
    """What differs between runs, openly; what is equal, folded."""
    known = [(record.name, settings(record.manifest)) for record in records if record.manifest]
    if not known:
        return ""
    keys = sorted({key for _, values in known for key in values})
    texts = {key: [value_text(values[key]) if key in values else "–" for _, values in known] for key in keys}
    differing = [key for key in keys if any(values.get(key) != known[0][1].get(key) for _, values in known)]
    equal = [key for key in keys if key not in differing]
    parts = []
    if len(known) > 1:
        head = ["differs", *(name for name, _ in known)]
        parts.append(html.table(head, [[key, *texts[key]] for key in differing], numbers=False))
    shown = html.table(["key", "value"], [[key, texts[key][0]] for key in equal], numbers=False)
    parts.append(html.folded("All settings" if len(known) == 1 else f"{len(equal)} equal settings", shown))
    return "\n".join(parts)


def _data(records: Sequence[RunRecord]) -> str:
    rows = []
    for record in records:
        for part, found in mapping(record.manifest.get("data")).items():
            entry = mapping(found)
            left_out = ", ".join(f"{reason}: {count}" for reason, count in mapping(entry.get("left_out")).items())
            rows.append([record.name, str(part), _sources(entry), value_text(entry.get("pairs")), left_out or "none"])
    return html.table(["run", "part", "from", "pairs used", "left out"], rows, numbers=False) if rows else ""


def _sources(entry: Mapping[str, Any]) -> str:
    listed = entry.get("sources")
    sources = [mapping(source) for source in listed] if isinstance(listed, list) else []
    return "; ".join(
        f"{value_text(source.get('name'))} ({value_text(source.get('form'))}, {value_text(source.get('pairs'))} pairs)"
        for source in sources
    )


def _versions(records: Sequence[RunRecord]) -> str:
    known = [record for record in records if record.manifest]
    names = sorted({name for record in known for name in mapping(record.manifest.get("versions"))})
    rows = [
        [name, *(value_text(mapping(record.manifest.get("versions")).get(name)) for record in known)] for name in names
    ]
    rows.append(["hardware", *(value_text(record.manifest.get("hardware")) for record in known)])
    shown = html.table(["", *(record.name for record in known)], rows, numbers=False) if known else ""
    return html.folded("Libraries and hardware", shown) if shown else ""


def _missing(records: Sequence[RunRecord]) -> str:
    notes = [f"{record.name + ': ' if len(records) > 1 else ''}{note}" for record in records for note in record.notes]
    for key, words in (("pairs_per_s", "Speed (pairs_per_s)"), ("peak_gib", "Peak memory (peak_gib)")):
        if not any(record.series(key).steps for record in records):
            notes.append(f"{words} is not in metrics.jsonl.")
    return html.items(notes)
