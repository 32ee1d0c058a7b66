"""What a step gives back: the pairs in their order, and what it did to them, for people and for the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafocal.data.sources import Preference


@dataclass(frozen=True, slots=True)
class Outcome:
    """Pairs after a step; `words` say what it did, `found` holds its numbers."""

    pairs: list[Preference]
    words: str
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step as the manifest keeps it; digests are of the ids in their order, one a line."""

    step: str
    settings: Mapping[str, Any]
    before: int
    after: int
    from_sha256: str
    ids_sha256: str
    words: str
    found: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.step}: {self.words} ({self.before} -> {self.after} pairs)"


def ids_sha256(pairs: Sequence[Preference]) -> str:
    """A digest of which pairs these are, and in which order."""
    return hashlib.sha256("\n".join(pair.id for pair in pairs).encode("utf-8", "surrogatepass")).hexdigest()
