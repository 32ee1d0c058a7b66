"""What two processes hold under each engine that splits a model is what `lorafocal.memory` says they do."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from lorafocal import memory
from lorafocal.memory import Setup, Shape
from tests.engine import held_run, launches
from tests.test_activation_bytes import MID

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    root = tmp_path_factory.mktemp("held")
    code, output = launches.run([*launches.TORCHRUN, held_run.__file__, str(root)])
    assert code == 0, output
    return [json.loads(file.read_text()) for file in sorted(root.glob("rank-*.json"))]


@pytest.mark.row("37")
@pytest.mark.parametrize("engine", held_run.ENGINES)
def test_weights_masters_gradients_and_moments_are_counted(ranks: list[dict[str, int]], engine: str) -> None:
    shape = Shape.of(CONFIG_MAPPING["llama"](**MID).to_dict())
    held = memory.residents(shape, Setup(full=True, engine=engine, reference="none"), len(ranks))
    planned = held.before + held.gradients + held.states
    assert len(ranks) == 2
    for rank in ranks:
        assert planned == pytest.approx(rank[engine], rel=0.005)  # buckets of a few kilobytes, and batches
