"""`lorafocal report`: from run folders to a folder with one page and its pictures, complete or absent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.publish import check_ours
from lorafocal.report import html, provenance
from lorafocal.report.numbers import HEADLINES, flips, headline, is_finite, parts
from lorafocal.report.page import Picture, number_text, page
from lorafocal.report.panels import drawable
from lorafocal.report.plots import DARK, LIGHT, margins_png, overview_png, panel_png, run_colours
from lorafocal.report.read import RunRecord, read_runs
from lorafocal.report.words import comparison_remarks, remarks

PAGE_FILE, CURVES_FILE = "report.html", "curves.png"
REPORT_DIR = "report"
_OURS = re.compile(r"report\.html|curves\.png|margins-\d+\.png")


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """Where a report lies, and what it says."""

    records: Sequence[RunRecord]
    page: Path
    pictures: Sequence[Path]

    def table(self) -> str:
        """Numbers and words of each run for a person, and where the page is."""
        blocks = []
        for record in self.records:
            values = headline(record)
            lines = [
                f"  {line.words:<46} {number_text(values[line.key], line.format):>12}"
                for line in HEADLINES
                if line.key in values
            ]
            lines += [f"  {line}" for line in provenance.lines(record)]
            words = [f"  {remark.seen}\n    {remark.means}\n    {remark.do}" for remark in remarks(record)]
            blocks.append("\n".join([record.name, *lines, *words, *(f"  note: {note}" for note in record.notes)]))
        blocks += [f"{remark.seen}\n  {remark.means}\n  {remark.do}" for remark in comparison_remarks(self.records)]
        pictures = [f"picture  {picture}" for picture in self.pictures]
        return "\n\n".join([*blocks, "\n".join([f"page     {self.page}", *pictures])])

    def as_dict(self) -> dict[str, Any]:
        """The same for a program; a number that is not finite is null."""
        return {
            "page": str(self.page),
            "pictures": [str(picture) for picture in self.pictures],
            "runs": [
                {
                    "name": record.name,
                    "numbers": {key: value if is_finite(value) else None for key, value in headline(record).items()},
                    "words": [remark.as_dict() for remark in remarks(record)],
                    "flips": [flip.as_dict() for flip in flips(record)],
                    "parts": [part.as_dict() for part in parts(record)],
                    "recipe": provenance.as_dict(record),
                    "missing": list(record.notes),
                }
                for record in self.records
            ],
            "comparison": [remark.as_dict() for remark in comparison_remarks(self.records)],
        }


def write_report(runs: Sequence[Path], out: Path | None = None) -> ReportSummary:
    """Draw and describe run folders into the folder `out`; for one run `<run>/report` if it is None.

    An earlier report in `out` is replaced once the new one is whole. Raises InputError for folders that hold no run
    to show, for several runs without `out`, and for an `out` that holds anything but a report; then nothing is written.
    """
    if out is None and len(runs) > 1:
        raise InputError("several runs share one report: say where it goes, --out DIR")
    records = read_runs(runs)
    target = Path(runs[0]) / REPORT_DIR if out is None else Path(out)
    check_ours(target, _OURS, "a report")
    curves = [
        Picture(panel_png(panel, records, LIGHT), panel_png(panel, records, DARK), panel.title)
        for panel in drawable(records)
    ]
    margins = _margin_pictures(records)
    files = {PAGE_FILE: page(records, curves, list(margins.values())).encode("utf-8", "replace")}
    files[CURVES_FILE] = overview_png(records)
    files |= {f"margins-{number}.png": picture.light for number, picture in margins.items()}
    html.write_folder(target, files)
    return ReportSummary(records, target / PAGE_FILE, [target / name for name in files if name != PAGE_FILE])


def _margin_pictures(records: Sequence[RunRecord]) -> dict[int, Picture]:
    """The margins of each run that left its pairs, by the run's number from 1."""
    pictures = {}
    for number, record in enumerate(records, start=1):
        light, dark = (
            margins_png(record, run_colours(len(records), theme)[number - 1], theme) for theme in (LIGHT, DARK)
        )
        if light is not None and dark is not None:
            words = f"Margins of held-out pairs of {record.name} at first, middle and last evaluation"
            pictures[number] = Picture(light, dark, words)
    return pictures
