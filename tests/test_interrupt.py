"""Signals that reach a trainer, and data workers beside it. What processes agree on: tests/engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.utils.data import DataLoader

from lorafocal.interrupt import StopOnSignal, left_to_the_trainer


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_is_remembered_and_a_second_one_acts_at_once(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), StopOnSignal()
    with stop.watching():
        os.kill(os.getpid(), number)
        assert stop.heard is number
        os.kill(os.getpid(), signal.SIGHUP)  # the terminal went, too: no second wish of anybody
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.heard is number
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("hang_ups")
def test_a_hang_up_that_is_ignored_remains_so() -> None:
    """As under nohup, also for a run inside a sweep."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    outer, inner = StopOnSignal(), StopOnSignal()
    with outer.watching(), inner.watching():
        os.kill(os.getpid(), signal.SIGHUP)
        assert inner.heard is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_of_its_own_hears_nothing_and_leaves_the_signals_alone() -> None:
    def during() -> list[object]:
        with StopOnSignal().watching():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(during).result() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_data_workers_outlive_a_signal_that_asks_the_trainer_to_finish_its_step(number: signal.Signals) -> None:
    loader = DataLoader(range(40), num_workers=1, worker_init_fn=left_to_the_trainer)  # type: ignore[arg-type]
    batches = iter(loader)
    first = next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, number)
    assert [int(batch) for batch in [first, *batches]] == list(range(40))


WORKERS = """
from types import SimpleNamespace
from lorafocal.sampler import step_loader
args = SimpleNamespace(
    pairs_per_step=2, process_index=0, world_size=1, dataloader_num_workers=1, dataloader_prefetch_factor=None,
    dataloader_persistent_workers={persistent},
)
batches = iter(step_loader(range(64), list, args, seed=1))
next(batches)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("persistent", "end", "code"),
    [(True, "[*batches]", 0), (False, "raise RuntimeError('in mid-epoch')", 1), (False, "", 0)],
    ids=["persistent workers", "an error in mid-epoch", "in mid-epoch"],
)
def test_a_process_ends_though_its_workers_ignore_what_it_sends_them(persistent: bool, end: str, code: int) -> None:
    """Python's exit sends daemons SIGTERM and waits for them without limit."""
    script = WORKERS.format(persistent=persistent, end=end)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.count("Traceback") == code, ended.stderr  # nothing else broke off on the way out
