"""Two processes on a quantised base compute what one does, and neither touches the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorafocal.objectives.focal import identity_loss
from tests.engine.forked import forked_ranks
from tests.engine.quantized_run import BASES, quantized_run
from tests.tiny import relative_difference, tiny_base

pytestmark = pytest.mark.engine

IN_FLOAT32 = 1e-6  # relative


def seen(root: Path, base: str, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{base}-{rank}.json").read_text())


@pytest.mark.row("48", "F1", "F3")
def test_gradients_on_a_quantised_base_are_those_of_one_process(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    for root in (together, alone):
        tiny_base().save_pretrained(root / "base")

    def work(_: int) -> None:
        for base in BASES:
            quantized_run(together, base)

    assert forked_ranks(work, tmp_path) == [0, 0]
    for base in BASES:
        quantized_run(alone, base)
        one = seen(alone, base, 0)
        for rank in (0, 1):
            two = seen(together, base, rank)
            assert (two["world"], two["engine"]) == (2, "DistributedDataParallel")
            assert two["bases"] == one["bases"]
            assert len({*two["bases"]}) == 1  # after training, and on either rank, what it was
            assert two["losses"] == pytest.approx(one["losses"], rel=IN_FLOAT32)
        assert one["losses"][0] == pytest.approx(identity_loss(0.05), abs=1e-6)
        ours, theirs = (load_file(root / f"{base}.safetensors") for root in (together, alone))
        assert relative_difference(ours, theirs) < IN_FLOAT32
