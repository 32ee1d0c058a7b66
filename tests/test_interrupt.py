"""Signals that reach data workers beside their trainer. What processes agree on: tests/engine."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import DataLoader

from lorafocal.interrupt import left_to_the_trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_data_workers_outlive_a_signal_that_asks_the_trainer_to_finish_its_step(number: signal.Signals) -> None:
    loader = DataLoader(range(40), num_workers=1, worker_init_fn=left_to_the_trainer)  # type: ignore[arg-type]
    batches = iter(loader)
    first = next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, number)
    assert [int(batch) for batch in [first, *batches]] == list(range(40))
