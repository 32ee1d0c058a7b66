"""docs/reproduction.md says what the recipes and `lorafocal plan` say, and names files and keys that exist."""

from __future__ import annotations

import re

import pytest

from lorafocal import recipes
from tests import reproduction_page
from tests.reproduction_page import ALIKE, ENGINES, FAMILIES, MACHINES, PAGE, cost

ROOT = PAGE.parents[1]


def test_the_tables_are_those_of_the_recipes_and_of_the_plan() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert reproduction_page.page(text) == text, "write it again: python -m tests.reproduction_page"


@pytest.mark.parametrize("family", FAMILIES)
def test_objectives_of_one_row_cost_the_same(family: str) -> None:
    for machine in MACHINES:
        for engine in ENGINES:
            costs = {cost(f"{family}-{name}", engine, machine) for name in ("focalpo", *ALIKE)}
            assert len(costs) == 1
            assert cost(f"{family}-simpo", engine, machine) == cost(f"{family}-orpo", engine, machine)


def test_files_and_recipes_that_the_page_names_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"(?:configs|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w-]+\.md)", text):
        assert (PAGE.parent / link).exists(), link
    endings = re.findall(r"`-([a-z][a-z-]+)`", text)
    assert {f"mistral-7b-{ending}" for ending in endings} <= {*recipes.names()}
    assert len(set(endings)) == 7
