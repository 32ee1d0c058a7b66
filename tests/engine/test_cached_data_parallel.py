"""Two processes compute a reference store together and train on it as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.cached_run import cached_run
from tests.engine.forked import forked_ranks
from tests.engine.ragged_run import HELD_OUT, PAIRS

pytestmark = pytest.mark.engine

ROUNDED = 2.0**-23  # two roundings to fp32 of what differs in the last bits of float64
TIMED = ("_per_s", "_runtime", "_per_second", "_gib")


@pytest.mark.row("34", "35", "F1")
def test_two_processes_share_the_work_and_train_as_one(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()

    def work(rank: int) -> None:
        (together / f"rank-{rank}.json").write_text(json.dumps(cached_run(together)))

    assert forked_ranks(work, tmp_path) == [0, 0]
    ranks = [json.loads((together / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    one = json.loads(json.dumps(cached_run(alone)))
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert sum(rank["computed"] for rank in ranks) == one["computed"] == 2 * (PAIRS + HELD_OUT)
    assert min(rank["computed"] for rank in ranks) > one["computed"] / 4
    assert [seen["again"] for seen in (*ranks, one)] == [0, 0, 0]
    assert ranks[0]["stored"] == ranks[1]["stored"]
    for ours, theirs in zip(ranks[0]["stored"], one["stored"], strict=True):
        assert ours == pytest.approx(theirs, rel=ROUNDED)
    for rank in ranks:
        assert rank["forwards"] == rank["packs"] > 0  # none of them is the reference's
    for line, expected in zip(ranks[0]["logs"], one["logs"], strict=True):
        for key in (key for key in expected if not key.endswith(TIMED)):
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
