"""`--tiny` for objectives that ask more of rows than two answers, and for references made of finished adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorafocal.config import load_config
from lorafocal.objectives import OBJECTIVES
from lorafocal.rehearsal import rehearse
from tests.test_configs import FOLDER, METHODS, name_of
from tests.test_rehearsal import LLAMA

pytestmark = pytest.mark.slow

SHAPE = ["model.name=nobody/nowhere", f"model.shape={json.dumps(LLAMA)}"]


def asked_of(file: Path) -> tuple[object, ...]:
    """What the objective of a config asks of rows and references."""
    entry = OBJECTIVES[load_config(file).objective.name]
    return entry.scores, entry.others, entry.groups, entry.embeddings, entry.guide


OF_EACH_KIND = sorted({asked_of(file): file for file in METHODS if any(asked_of(file))}.values())
OF_ADAPTERS = sorted(file for file in FOLDER.glob("references/*.yaml") if "runs/" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", OF_EACH_KIND + OF_ADAPTERS, ids=name_of)
def test_what_is_asked_for_is_made_up(file: Path) -> None:
    result = rehearse(load_config(file, SHAPE), quiet=True)
    assert math.isfinite(result.last_loss)
    assert (result.steps, result.scored) == (3, 4)


def test_finished_adapters_of_a_reference_are_trained_first_and_named() -> None:
    wanted = ["reference.members=[base,runs/a/adapter,runs/b/adapter]"]
    result = rehearse(load_config(FOLDER / "references" / "several.yaml", [*SHAPE, *wanted]), quiet=True)
    for place in ("runs/a/adapter", "runs/b/adapter"):
        assert f"reference.members: a new adapter trained for one step, for {place}" in result.instead
