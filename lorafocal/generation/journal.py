"""What is answered already: a file beside the answers that a kill cannot lose more than a batch of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lorafocal.errors import InputError
from lorafocal.generation.asks import Completion, Key
from lorafocal.publish import GrowingFile
from lorafocal.resume import changes


def journal_file(out: Path) -> Path:
    """Where the progress towards the answers in `out` lies."""
    return out.with_name(f"{out.stem}.partial.jsonl")


class Journal:
    """The first line says what is being made; each further one holds a batch's answers. One process writes it."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Open the journal of `about`, or begin it.

        Raises InputError where it is another generation's, is damaged, or is being written by another process.
        """
        self.path = path
        self.done: dict[Key, Completion] = {}
        self._file = GrowingFile(path)
        try:
            if self._file.lines:
                self._read(self._file.lines, about)
            else:
                self._file.add({"generating": about})
        except InputError:
            self._file.close()
            raise

    def _read(self, lines: Sequence[bytes], about: Mapping[str, Any]) -> None:
        try:
            header, *batches = [json.loads(line) for line in lines]
            before = header["generating"]
            for batch in batches:
                for key, text, tokens, ended in batch["answers"]:
                    self.done[tuple(key)] = Completion(text, tokens, ended)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error}): remove it to begin again") from error
        check_same(before, about, self.path)

    def add(self, keys: Sequence[Key], answers: Sequence[Completion]) -> None:
        """A batch's answers, on disk when this returns."""
        self._file.add({"answers": [[k, a.text, a.tokens, a.ended] for k, a in zip(keys, answers, strict=True)]})
        self.done |= dict(zip(keys, answers, strict=True))

    def remove(self) -> None:
        """What it was kept for is there."""
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with, or to take for finished, what other settings made. Raises InputError naming each."""
    others = changes(before, json.loads(json.dumps(now)), ())
    if others:
        raise InputError(
            f"{file} is of another generation:\n  "
            + "\n  ".join(others)
            + "\nset these back to go on with it, or choose another --out (or remove it, to begin again)"
        )
