"""What a careless author would have written instead, in chat and in what is published; more of `tests.careless`.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def one_cache_for_all_streams(original: Any) -> Any:
    """Row 6: what was computed with the adapter on is also what the next token with it off attends to."""
    shared: dict[str, Any] = {}

    def next_logits(stream: Any) -> Any:
        if stream.ids:
            stream._cache = shared["cache"]
        logits = original(stream)
        shared["cache"] = stream._cache
        return logits

    return next_logits


def switched_for_the_prompt_only(turns: Any) -> Any:
    """Row 6: the adapter is off while the prompt is read, and on again when the answer is drawn."""
    for stream, state in turns:
        with state():
            stream.step()
    while not all(stream.done for stream, _ in turns):
        for stream, _ in turns:
            if not stream.done:
                stream.step()
                yield


def whatever_lies_there(_: Any) -> Any:
    """Row S14: the folder as it is, as `upload_folder` would take it."""

    def every_file(folder: Path, *, with_pairs: bool = False) -> tuple[dict[str, Path], list[str]]:
        return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}, []

    return every_file
