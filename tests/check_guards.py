"""Switch every guard off, one at a time, and see its test fail: `make guards`.

Exit 1 when a test passes without its guard, when a P0 row has no guard, or when no test names a row.
Each run is a fork of one process that has already paid for importing the libraries (not lorafocal: a guard is off
before its modules are imported).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.guards import GUARDS, OTHER_ROWS, P0_ROWS, Guard

PROCESSES = 2
LIMIT_S = 300
ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = """_hypothesis_pytestplugin anyio.pytest_plugin bitsandbytes datasets hypothesis.strategies peft pydantic
    torch._dynamo transformers.models.llama.modeling_llama transformers.models.mistral.modeling_mistral
    transformers.trainer trl.trainer.dpo_trainer xdist.plugin""".split()


class Collector:
    """A pytest plugin: which tests carry which row."""

    def __init__(self) -> None:
        self.tests_of_row: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("row"):
                for row in marker.args:
                    self.tests_of_row.setdefault(str(row), set()).add(item.nodeid.partition("[")[0])


class Failures:
    """A pytest plugin: how the bodies of the tests ended (a fixture that breaks proves nothing)."""

    def __init__(self) -> None:
        self.passed = 0
        self.reasons: list[str] = []

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        if call.when != "call":
            return
        if call.excinfo is None:
            self.passed += 1
        elif not call.excinfo.errisinstance(pytest.skip.Exception):
            text = call.excinfo.exconly().strip().splitlines()
            self.reasons.append(text[0][:110] if text else call.excinfo.typename)


def run_pytest(arguments: list[str], plugin: object) -> tuple[int, str]:
    """Run pytest in this process; its exit code and all it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *arguments], plugins=[plugin])
    return int(code), output.getvalue()


def collect_rows() -> tuple[int, str, dict[str, set[str]]]:
    """pytest's exit code and output, and the tests of each row."""
    collector = Collector()
    code, output = run_pytest(["--collect-only", "-q", "tests"], collector)
    return code, output, collector.tests_of_row


def try_without(guard: Guard) -> tuple[bool, str, float]:
    """Whether the test of one guard fails with the guard off, what it said, and the seconds it took."""
    start, failures = time.monotonic(), Failures()
    code, output = run_pytest(["-q", "-x", "--guard-off", guard.name, guard.test], failures)
    if failures.reasons:
        fails, reason = True, failures.reasons[0]
    elif failures.passed:
        fails, reason = False, "the test PASSES with its guard off"
    else:
        fails, reason = False, f"the test did not run (exit code {code})\n{output[-2000:]}"
    return fails, reason, time.monotonic() - start


def in_forks(jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Iterator[tuple[int, Any]]:
    """Run each job in its own fork, `PROCESSES` at a time; yield (number, result).

    The result is None when the process died or ran over `LIMIT_S`.
    Not a pool: its workers are daemons, which may not start processes, as the tests of several processes do.
    """
    context = multiprocessing.get_context("fork")

    def send(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        connection.send(function(*arguments))

    waiting, running = list(enumerate(jobs)), {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            number, (function, arguments) = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(sender, function, arguments))
            process.start()
            sender.close()
            running[receiver] = (number, process, time.monotonic() + LIMIT_S)
        ready = wait(list(running), timeout=1)
        now = time.monotonic()
        overdue = [key for key, (_, _, limit) in running.items() if key not in ready and now > limit]
        for receiver in [*ready, *overdue]:
            number, process, _ = running.pop(receiver)
            result = None
            if receiver in ready:
                with contextlib.suppress(EOFError):
                    result = receiver.recv()
            if receiver in overdue:
                process.kill()
            process.join()
            yield number, result


def inconsistencies(tests_of_row: dict[str, set[str]]) -> list[str]:
    """What is missing or contradicts itself in the table and in the markers, one line each."""
    known = set(P0_ROWS) | set(OTHER_ROWS)
    guarded = {row for guard in GUARDS for row in guard.rows.split()}
    names = [guard.name for guard in GUARDS]
    problems = [f"row {row}: no test carries its marker" for row in sorted(known - tests_of_row.keys())]
    problems += [f"row {row} is P0 and has no guard" for row in P0_ROWS if row not in guarded]
    problems += [f"guard {name}: the name is not unique" for name in sorted(set(names)) if names.count(name) > 1]
    for guard in GUARDS:
        problems += _unmarked_rows(guard, tests_of_row)
    return problems


def _unmarked_rows(guard: Guard, tests_of_row: dict[str, set[str]]) -> list[str]:
    test = guard.test.partition("[")[0]
    return [
        f"guard {guard.name}: {test} does not carry row {row}"
        for row in guard.rows.split()
        if test not in tests_of_row.get(row, set())
    ]


def main() -> int:
    """Print one line a guard and one a problem; the exit code."""
    os.chdir(ROOT)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # no fork looks through them again, or copies their pages by doing so

    results: dict[int, Any] = {}
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(collect_rows, ())]
    jobs += [(try_without, (guard,)) for guard in GUARDS]
    for number, result in in_forks(jobs):
        results[number] = result
        if number:
            fails, reason, seconds = result or (False, f"the process died, or ran over {LIMIT_S} s", 0.0)
            name = GUARDS[number - 1].name
            print(f"{'ok ' if fails else 'BAD'} {seconds:6.1f} s  {name:48} {reason}", flush=True)
    code, output, tests_of_row = results.pop(0)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        print(output)
    problems = inconsistencies(tests_of_row)
    print(*problems, sep="\n")
    held = sum(bool(result and result[0]) for result in results.values())
    print(f"== guards: {held} held, {len(results) - held} did not, {len(problems)} other problems ==")
    return 0 if held == len(results) and not problems and code == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lorafocal-guards-") as cache:
        os.environ["LORAFOCAL_TEST_CACHE"] = cache
        sys.exit(main())
