"""Kills a process at every moment of what it does to files; the parent then looks at what is left."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def killed_at(count: int, work: Callable[[], None], watched: Path) -> bool:
    """Runs `work` in a forked child that kills itself at its `count`-th operation on files under `watched`.

    Operations are opening, renaming, making and removing, and the moments before and after each sync. Returns
    False if `work` ended with fewer of them; raises if it failed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _kill_self_at(count, watched)
            work()
            status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    if os.WIFSIGNALED(result):
        assert os.WTERMSIG(result) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(result) == 0, "the child failed before it was killed"
    return False


def moments(work: Callable[[], None], watched: Path, *, limit: int = 1000) -> Iterator[bool]:
    """Kills `work` at its first, second, ... operation, yielding True each time; False once it finished."""
    for count in range(1, limit):
        was_killed = killed_at(count, work, watched)
        yield was_killed
        if not was_killed:
            return
    raise AssertionError(f"more than {limit} operations")


def _kill_self_at(count: int, watched: Path) -> None:
    left = count

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and any(_touches(argument, watched) for argument in arguments):
            tick()

    real_sync = os.fsync

    def sync(handle: Any) -> None:
        tick()
        real_sync(handle)
        tick()

    os.fsync = sync
    sys.addaudithook(audit)


def _touches(argument: Any, watched: Path) -> bool:
    """Whether an argument is a path under `watched`, or a bare name (as when a tree is removed)."""
    if not isinstance(argument, str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(argument))
    return not path.is_absolute() or path.is_relative_to(watched)
