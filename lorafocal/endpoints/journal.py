"""The replies there are, a line each, written as they come: what was paid for outlives the process that paid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from lorafocal.endpoints.reply import MalformedReply, Reply, from_dict
from lorafocal.errors import InputError, unreadable
from lorafocal.publish import GrowingFile, whole_lines


def read_journal(path: Path) -> dict[str, Reply]:
    """Replies by the key of their question, empty where there is no file.

    A last line without its end is what a kill leaves, and no reply. Raises InputError for any other damage.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(path, error) from error
    return _replies(path, whole_lines(content))


def _replies(path: Path, lines: Sequence[bytes]) -> dict[str, Reply]:
    replies = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            replies[str(record["key"])] = from_dict(record)
        except (ValueError, LookupError, TypeError, MalformedReply) as error:
            raise InputError(
                f"{path}:{number} is no reply of a journal. Remove that line (its question is asked again), or move"
                " the file away"
            ) from error
    return replies


class Journal:
    """A journal opened for writing, by one process at a time; `replies` is what it holds.

    Raises InputError where another process writes it, or where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        try:
            self.replies = _replies(path, self._file.lines)
        except InputError:
            self._file.close()
            raise

    def add(self, key: str, reply: Reply) -> None:
        """One line, on disk before this returns; from any thread."""
        self._file.add({"key": key, **reply.as_dict()})
        self.replies[key] = reply

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
