"""Writes the tables of docs/reading-list.md from docs/reading-list.csv and the registry:

python -m tests.reading_list_page
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorafocal.objectives import OBJECTIVES
from tests.made_parts import made_anew

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reading-list.md"
LIST = PAGE.with_suffix(".csv")

HERE = {
    "here": ("objective", "objectives.md"),
    "reference": ("`reference.kind`", "references.md"),
    "step": ("`data.steps`", "data-steps.md"),
    "stages": ("`stages` and `data.steps`", "data-steps.md"),
    "turns": ("answers of several turns with", "data.md"),
    "kit": ("part of the kit:", "design.md"),
}
"""Kinds of papers whose method runs here: what `where` names, and the page on it."""
ELSEWHERE = {
    "pairs": "makes pairs; they train here",
    "loop": "generates, searches or asks for labels inside its loop",
    "media": "images, video or sound",
    "model": "trains, or decodes with, another model than the policy",
    "optimiser": "another optimiser",
    "survey": "a survey",
    "study": "a study, with no method of its own to run",
    "other": "no language model",
    "unclear": "**not reproducible from public text**",
    "doubtful": "**doubtful**: public code and paper disagree",
}
"""Kinds of papers that belong elsewhere, and why."""
OF_OTHER_PAPERS = {
    "focalpo", "focalpo-eq3", "focalpo-detached", "focal-hard", "cdpo", "dpo-norm", "cpo", "orpo", "kto", "sft",
}  # fmt: skip
"""Objectives of papers that are not on the list: FocalPO's own, and baselines."""


class Paper(NamedTuple):
    """A line of the list."""

    number: str
    title: str
    kind: str
    where: str
    note: str

    @property
    def named(self) -> list[str]:
        """What of the kit it is run by."""
        return self.where.split()

    @property
    def answer(self) -> str:
        """Whether and where it is here."""
        if self.kind in ELSEWHERE:
            return ELSEWHERE[self.kind]
        what, page = HERE[self.kind]
        return f"[{what}]({page}) {', '.join(f'`{name}`' for name in self.named)}"


def papers() -> list[Paper]:
    with LIST.open(encoding="utf-8", newline="") as file:
        return [Paper(**line) for line in csv.DictReader(file)]


def page(text: str) -> str:
    """The page with its tables made anew."""
    return made_anew(text, counts=counts(), papers=table())


def counts() -> Iterator[str]:
    """How many papers are of each kind."""
    count = Counter(paper.kind for paper in papers())
    here = sum(count[kind] for kind in HERE)
    ways = f"{len(OBJECTIVES)} objectives, reference strategies and data steps"
    yield f"{here} of the {count.total()} run here, by {ways}."
    yield "The others:"
    yield ""
    yield from (f"- {count[kind]}: {words}" for kind, words in ELSEWHERE.items())


def table() -> Iterator[str]:
    yield "| # | paper | here | |"
    yield "|--:|---|---|---|"
    for paper in papers():
        yield f"| {paper.number} | {paper.title} | {paper.answer} | {paper.note} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
