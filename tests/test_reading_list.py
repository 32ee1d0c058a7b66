"""docs/reading-list.md: all papers, what the kit has of them, and nothing that it has not."""

from __future__ import annotations

import re

import pytest

from lorafocal.objectives import OBJECTIVES
from lorafocal.reference import REFERENCES
from lorafocal.schema.steps import Step
from tests import reading_list_page
from tests.reading_list_page import ELSEWHERE, HERE, OF_OTHER_PAPERS, PAGE, papers


def test_the_tables_are_those_of_the_list() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert reading_list_page.page(text) == text, "write it again: python -m tests.reading_list_page"


def test_all_168_papers_are_there_once_each_with_an_answer() -> None:
    found = papers()
    assert [paper.number for paper in found] == [str(number) for number in range(1, 169)]
    assert len({paper.title for paper in found}) == 168
    assert {paper.kind for paper in found} <= {*HERE, *ELSEWHERE}
    for paper in found:
        assert paper.title
        assert bool(paper.named) or paper.kind in ELSEWHERE
        assert paper.note or paper.kind in {"here", "reference", "media", "survey"}, f"{paper.number}: say why"


def test_every_objective_is_of_a_paper_on_the_list_or_known_to_be_of_another() -> None:
    named = {name for paper in papers() if paper.kind in ("here", "turns") for name in paper.named}
    assert named <= {*OBJECTIVES}
    assert OBJECTIVES.keys() - named == OF_OTHER_PAPERS


def test_reference_strategies_exist() -> None:
    named = {name for paper in papers() if paper.kind == "reference" for name in paper.named}
    assert named <= {*REFERENCES}


@pytest.mark.parametrize("name", ["step", "stages"])
def test_data_steps_exist(name: str) -> None:
    named = {step for paper in papers() if paper.kind == name for step in paper.named}
    assert named <= {*Step.model_fields}


def test_objectives_that_the_page_names_exist() -> None:
    prose = PAGE.read_text(encoding="utf-8").partition("<!-- counts -->")[0]
    names = set(re.findall(r"`([a-z-]+-(?:dpo|po|rpo))`", prose))
    assert names
    assert names <= {*OBJECTIVES}
