"""Full-parameter recipes rehearsed under ZeRO-3, one after the other, by every process of a launch."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

from lorafocal.config import load_config
from lorafocal.rehearsal import rehearse

PAPER = Path(__file__).resolve().parents[2] / "configs/paper"


def rehearsed(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What each rehearsal said and made; nothing but for rank 0."""
    said = {}
    for name in names:
        found = rehearse(load_config(PAPER / f"{name}.yaml", ["engine.kind=zero3"]), quiet=True)
        gc.collect()
        if found is not None:
            said[name] = {"said": str(found), "made": found.made}
    return said
