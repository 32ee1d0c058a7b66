"""What every test runs under: offline, one thread, own caches, fixed seeds; and no silent skip in CI.

`--guard-off NAME` (see tests/guards.py) switches one guard off before anything is collected.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import browser

# The only skips allowed where none may pass unseen (CI=true or LORAFOCAL_NO_SKIPS=1): marker -> why.
ALLOWED_SKIPS = {
    "gpu": "needs a CUDA device, which the machine of the tests does not have",
    "chromium": "needs a Chromium, to open pages with",
}
# The same cases in every run, and however busy the machine is: an example is no test of speed.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}


def _private_caches() -> None:
    """Point every cache at one temporary folder, shared by the xdist workers, who inherit the paths."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    cache = os.environ.get("LORAFOCAL_TEST_CACHE")
    if cache is None:
        cache = tempfile.mkdtemp(prefix="lorafocal-tests-")
        owner = os.getpid()  # a forked child inherits this exit hook, and must not delete its parent's folder
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(cache, ignore_errors=True))
    os.environ.update(
        XDG_CACHE_HOME=cache,
        HF_HOME=str(Path(cache) / "huggingface"),
        MPLCONFIGDIR=str(Path(cache) / "matplotlib"),
    )


_private_caches()
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)


# --- no network ---------------------------------------------------------------------------------------------


def _refuse_remote(name: str) -> None:
    """Replace `socket.socket.<name>` by one that raises for anything but this machine."""
    original = getattr(socket.socket, name)

    def local_only(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to reach the network: {address!r}")
        return original(self, address)

    setattr(socket.socket, name, local_only)


def _refuse_remote_names() -> None:
    """Replace name look-up by one that raises for anything but this machine."""
    original = socket.getaddrinfo
    local = LOCAL_HOSTS | {socket.gethostname()}

    def local_only(host: Any, *args: Any, **kwargs: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in local:
            raise RuntimeError(f"a test tried to look up {host!r}")
        return original(host, *args, **kwargs)

    socket.getaddrinfo = local_only


# --- options and markers ------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--guard-off", metavar="NAME", help="switch one guard of tests/guards.py off")


def pytest_configure(config: pytest.Config) -> None:
    _refuse_remote("connect")
    _refuse_remote("connect_ex")
    _refuse_remote_names()
    if name := config.getoption("--guard-off"):
        from tests import guards

        guards.switch_off_here_and_in_children(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if browser.find() is None:
        for item in items:
            if item.get_closest_marker("chromium"):
                item.add_marker(pytest.mark.skip(reason=ALLOWED_SKIPS["chromium"]))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """accelerate collects garbage in every run, a third of a second: leave out what the imports made."""
    gc.collect()
    gc.freeze()


# --- every test starts alike --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Fixed seeds and one thread; afterwards the default dtype is back and no process group is left over."""
    random.seed(0)
    torch = sys.modules.get("torch")  # a test that needs torch has imported it by now; the others stay fast
    if torch is None:
        yield
        return
    import numpy as np

    np.random.seed(0)  # noqa: NPY002 - transformers and peft draw from the legacy generator
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- skips --------------------------------------------------------------------------------------------------

_unnamed_skips: list[str] = []


def _no_skips() -> bool:
    return os.environ.get("CI") == "true" or os.environ.get("LORAFOCAL_NO_SKIPS") == "1"


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    if not ALLOWED_SKIPS.keys() & getattr(report, "keywords", {}).keys():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _unnamed_skips.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if _unnamed_skips and _no_skips() and not is_worker and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _unnamed_skips and _no_skips():
        terminalreporter.section("skips outside ALLOWED_SKIPS (tests/conftest.py)", red=True)
        for line in _unnamed_skips:
            terminalreporter.line(line)


@pytest.fixture
def hang_ups() -> Iterator[None]:
    """SIGHUP as a terminal leaves it: the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
