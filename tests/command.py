"""Calls of the command in this process or in one of its own, with stand-ins for heavy modules."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from lorafocal import cli

CONFIG = """
name: run
model: {name: base, dtype: float32}
adapter: {r: 8, alpha: 16}
data: {train: train.jsonl}
objective: {name: focalpo, beta: 0.1, gamma: 0.5}
reference: {kind: disabled_adapter}
training: {pairs_per_step: 64}
"""


@dataclass
class Summary:
    interrupted_by: int | None = None

    def __str__(self) -> str:
        return "the summary"


class Report:
    def as_dict(self) -> dict[str, Any]:
        return {"pairs": 3, "name": "Zoë"}

    def table(self) -> str:
        return "a table"


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str, result: Any) -> list[Any]:
    """Put a module with one recording function in place of `lorafocal.<module>`; returns its calls."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    fake = ModuleType(f"lorafocal.{module}")
    setattr(fake, function, record)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    if "." not in module:
        monkeypatch.setattr(sys.modules["lorafocal"], module, fake, raising=False)
    return calls


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lorafocal", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def command(
    *arguments: object, code: str = "from lorafocal.cli import main; main()"
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
