"""The replies there are, a line each, written as they come: what was paid for outlives the process that paid."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lorafocal.endpoints.reply import MalformedReply, Reply, from_dict
from lorafocal.errors import InputError


def read_journal(path: Path) -> dict[str, Reply]:
    """Replies by the key of their question, empty where there is no file.

    A last line without its end is what a kill leaves, and no reply. Raises InputError for any other damage.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return _replies(path, content)


def _replies(path: Path, content: bytes) -> dict[str, Reply]:
    replies = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
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
    """A journal opened for writing, by one process at a time.

    Raises InputError where another process writes it, or where it is damaged. `replies` is what it holds.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link: links are never written through; give the real path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            content = self._file.read()
            self.replies = _replies(path, content)
            self._file.truncate(content.rfind(b"\n") + 1)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(f"{path} is being written by another process: wait for it to end, or stop it") from error
        except InputError:
            self._file.close()
            raise

    def add(self, key: str, reply: Reply) -> None:
        """One line, handed to the system before this returns; from any thread."""
        line = json.dumps({"key": key, **reply.as_dict()}).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.replies[key] = reply

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
