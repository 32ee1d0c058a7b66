"""What is answered already: a file beside the answers that a kill cannot lose more than a batch of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.generation.asks import Completion, Key
from lorafocal.publish import write_atomically
from lorafocal.resume import changes


def journal_file(out: Path) -> Path:
    """Where the progress towards the answers in `out` lies."""
    return out.with_name(f"{out.stem}.partial.jsonl")


class Journal:
    """The first line says what is being made; each further one holds a batch's answers.

    A line that a kill left torn is cut off when the journal is opened.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Open the journal of `about`, or begin it. Raises InputError where it is another generation's."""
        self.path = path
        self.done: dict[Key, Completion] = {}
        if not path.is_file():
            write_atomically(path, _line({"generating": about}))
            return
        lines = path.read_bytes().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))
        self._read(whole, about)

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
        rows = [[key, a.text, a.tokens, a.ended] for key, a in zip(keys, answers, strict=True)]
        with self.path.open("ab") as file:
            file.write(_line({"answers": rows}).encode())
            file.flush()
            os.fsync(file.fileno())
        self.done |= dict(zip(keys, answers, strict=True))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with, or to take for finished, what other settings made. Raises InputError naming each."""
    others = changes(before, json.loads(json.dumps(now)), ())
    if others:
        raise InputError(
            f"{file} is of another generation:\n  "
            + "\n  ".join(others)
            + "\nset these back to go on with it, or choose another --out (or remove it, to begin again)"
        )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
