"""A config, and adapter folders, for the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import CONFIG


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two adapter folders, `one` and `other`, in the working directory."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
