"""Answers during training by two processes: each writes its share, and the log is that of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafocal import run
from lorafocal.config import check_config
from lorafocal.evaluate.during import callbacks
from tests.engine.forked import forked_ranks
from tests.evaluate.test_during import ASKED, SHARE, answers_at, config_of, shares, trained
from tests.toy_run import write_inputs

pytestmark = pytest.mark.engine


def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    root = write_inputs(tmp_path / "inputs")
    config = check_config(config_of(root, {**ASKED, "count": 5}).model_dump(mode="json"))
    alone = trained(config, tmp_path / "alone")

    def work(rank: int) -> None:
        shared = config.model_copy(update={"engine": None})
        run.train(shared, quiet=True, runs_dir=tmp_path / "together", callbacks=callbacks)

    assert forked_ranks(work, tmp_path) == [0, 0]
    together = tmp_path / "together" / "toy"
    one, two = shares(alone), shares(together)
    assert list(one) == list(two)
    assert one[0][SHARE] == two[0][SHARE]  # the same weights; later ones differ in their last bits
    assert answers_at(alone, 0) == answers_at(together, 0)
    lines = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == sum(
        "loss" in json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()
    )
