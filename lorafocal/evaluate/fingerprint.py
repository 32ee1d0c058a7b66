"""Whether a run does to held-out pairs what a released checkpoint does: the correlation of their implicit rewards."""

from __future__ import annotations

from pathlib import Path

from lorafocal.evaluate.result import Result


def evaluate_fingerprint(
    target: str,
    *,
    released: str,
    pairs: Path,
    base: str | None = None,
    target_reference: str | None = None,
    released_reference: str | None = None,
) -> Result:
    """Correlate the margins of `target` and of `released` on `pairs`, each against its own reference."""
    raise NotImplementedError
