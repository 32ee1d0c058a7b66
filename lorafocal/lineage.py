"""Where an adapter or a merged model comes from: the file `lorafocal.json` beside its weights."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError

LINEAGE_FILE = "lorafocal.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base model: hub id (or a local folder's last name, never a path), hub revision, digest of its
    weights."""

    name: str
    revision: str | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What made these weights.

    `objective` is `{"name", "beta", "gamma"}`, or None where an adapter of another tool was merged.
    `parents` names what was folded in: a merged model has its adapter there as `{"adapter", "sha256"}`.
    """

    base: BaseIdentity
    objective: Mapping[str, Any] | None
    steps: int
    pairs_seen: int
    reference: str | None = "disabled_adapter"
    parents: tuple[Mapping[str, Any], ...] = ()
    lorafocal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the file; `format` rises when a reader of the old one would misread the new
        one."""
        version = self.lorafocal or installed_version()
        return {
            "format": FORMAT,
            "lorafocal": version,
            "base": asdict(self.base),
            "parents": [dict(parent) for parent in self.parents],
            "reference": self.reference,
            "objective": None if self.objective is None else dict(self.objective),
            "steps": self.steps,
            "pairs_seen": self.pairs_seen,
        }

    def write(self, folder: Path) -> None:
        """Write `lorafocal.json` into `folder`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / LINEAGE_FILE).write_text(text, encoding="utf-8")


def lineage_of(folder: Path) -> Lineage | None:
    """Read `folder/lorafocal.json`; None where there is none (an adapter of another tool).

    Raises InputError naming the file where it is not readable as this format.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["format"]
        if found != FORMAT:
            raise InputError(f"{path}: format {found!r}; only {FORMAT} is read. Use the version that wrote it.")
        return Lineage(
            base=BaseIdentity(**record["base"]),
            objective=record["objective"],
            steps=record["steps"],
            pairs_seen=record["pairs_seen"],
            reference=record["reference"],
            parents=tuple(record["parents"]),
            lorafocal=record["lorafocal"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a lineage file ({type(error).__name__}: {error}). "
            "Restore it from the run, or delete it to treat the adapter as one of another tool."
        ) from error


def installed_version() -> str:
    """Version of the installed package, or `unknown` when it runs from a bare source tree."""
    try:
        return importlib.metadata.version("lorafocal")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
