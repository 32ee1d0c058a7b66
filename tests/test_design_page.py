"""docs/design.md tells the truth: its recipes run as they stand, and its floors are the real ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorafocal.data.forms import FORMS
from lorafocal.objectives import OBJECTIVES
from tests.test_architecture import FLOOR_OF

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def run_blocks(name: str) -> dict[str, Any]:
    """The blocks marked `name`, one after the other, as one program; what it defined."""
    names: dict[str, Any] = {"__name__": f"design_{name}"}
    blocks = [code for marked, code in BLOCK.findall(PAGE) if marked == name]
    assert len(blocks) > 1
    for code in blocks:
        exec(compile(code, f"docs/design.md: {name}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def registries_are_put_back() -> Any:
    objectives, forms = dict(OBJECTIVES), dict(FORMS)
    yield
    for registry, before in ((OBJECTIVES, objectives), (FORMS, forms)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def test_every_python_block_is_run() -> None:
    assert PAGE.count("```python") == len(BLOCK.findall(PAGE)) == 5


def test_an_objective_is_added_checked_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks("objective")
    assert names["run"].state.global_step == 2
    assert names["run"].objective.name == "target-dpo"


def test_a_data_form_is_added_and_reads_rows() -> None:
    assert run_blocks("form")["read"].form == "ranked"


def test_the_floors_on_the_page_are_the_real_ones() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert [int(floor) for floor, _ in rows] == sorted({*FLOOR_OF.values()})
    for floor, text in rows:
        rooms = re.findall(r"`(\w+)`", text)
        assert rooms
        assert {FLOOR_OF[room] for room in rooms} == {int(floor)}


def test_files_the_page_names_exist() -> None:
    root = Path(__file__).resolve().parents[1]
    named = set(re.findall(r"`((?:lorafocal/|tests/)?[\w/]+\.py)`", PAGE)) - {"lorafocal/objectives/target_dpo.py"}
    missing = [n for n in named if not (root / n).exists() and not (root / "lorafocal" / n).exists()]
    assert not missing
