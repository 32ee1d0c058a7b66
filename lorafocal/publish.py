"""Complete or absent: folders, files, and lines of a growing file that are there only when whole and on disk.

A folder is written beside its target under a hidden name, synced, and renamed; a kill at any moment leaves
the old target, the new one, or (while one replaces the other) a hidden whole copy that `recover` puts back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

from lorafocal.errors import NO_ROOM, InputError

RECORD = "complete.json"
HASHERS = 8  # files that are read at a time
_MEANING = {errno.EFBIG: " (for ulimit -f, or for its file system)"}  # what the system's word leaves open
_NAME = re.compile(r"(?!\.)[a-z0-9._-]{1,64}")
_HELD: set[int] = set()  # handles of the folders that this process is alone in
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-(?P<pid>\d{1,10})(-[0-9a-f]{8})?")


def check_name(name: str) -> str:
    """`name` itself if it can name a run or an adapter (one plain path component); `InputError` otherwise."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InputError(f"{name!r} cannot be a name: use 1 to 64 of the characters a-z 0-9 . _ - and no leading dot")
    return name


def inside(root: Path, name: str) -> Path:
    """The path `root/name`, refused (`InputError`) if the name is not plain or a link leads out of `root`."""
    target = root / check_name(name)
    _refuse_link(target)
    return target


@contextlib.contextmanager
def published(target: Path, *, replace: bool = False, record: bool = True) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends well, the folder is renamed to `target`.

    With `record` the folder gets a `complete.json` (size and sha256 of each file) that `why_incomplete`
    verifies; folders made for publication go without. An existing target is refused unless `replace`, and
    then stays whole until the new one is on disk. If the block raises, the target is as it was. One process
    must not publish the same target twice at a time.
    """
    check_free(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent, target.name)
    partial = hidden(target, "partial")
    partial.mkdir()
    try:
        with full_disk_named(target):
            yield partial
            if record:
                write_record(partial)
            _sync_tree(partial)
        check_free(target, replace)
        if target.exists():
            target.replace(hidden(target, "replaced"))
        partial.replace(target)
        _sync(target.parent)
    finally:
        recover(target.parent, target.name)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file `path` by `content` (text as UTF-8): readers see the old or the new, never a part.

    Raises InputError where something else than a file is there.
    """
    check_file(path)
    own = hidden(path, "partial")
    partial = own.with_name(f"{own.name}-{secrets.token_hex(4)}")  # in containers that share a disk ids are the same
    try:
        with full_disk_named(path):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


class GrowingFile:
    """A file of JSON lines that one process at a time adds to, from any of its threads.

    `lines` are those that were there; a last one that a kill left torn is cut off. Raises InputError where another
    process writes it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror})") from error
        try:
            _lock(self._file.fileno(), f"{path} is being written by another process: wait for it to end, or stop it")
        except InputError:
            self._file.close()
            raise
        self._file.seek(0)
        self.lines = whole_lines(self._file.read())
        self._file.truncate(sum(len(line) + 1 for line in self.lines))

    def add(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock, full_disk_named(Path(self._file.name)):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Within, a disk without room is an OSError that says where: the file, where the system names it, else `place`.
    Of two that it names, as of a copy, that is the second.

    The system names no file that it has opened before, and safetensors hands its words on in an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        known = error.errno if isinstance(error, OSError) else None
        for code in NO_ROOM:
            if code == known or (known is None and os.strerror(code) in str(error)):
                name = getattr(error, "filename2", None) or getattr(error, "filename", None) or str(place)
                raise OSError(code, os.strerror(code) + _MEANING.get(code, ""), str(name)) from error
        raise


@contextlib.contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Within, `folder`, which is there, is being `doing` by this process alone. Raises InputError where another is.

    The system's lock on the folder itself ends with the process, however that ends, and leaves no file. In a network's
    file system it holds on this machine.
    """
    replaced = f"{folder} was replaced by another process just now: try again"
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:
        raise InputError(replaced) from error
    _HELD.add(handle)
    try:
        _lock(handle, f"{folder} is being {doing} by another process: wait for it, or stop it first")
        if not _is_still(handle, folder):  # a start that failed beside this one has removed the folder that it made
            raise InputError(replaced)
        yield
    finally:
        if handle in _HELD:
            _HELD.remove(handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing does not, until a worker just forked has let go
            os.close(handle)


def _lock(handle: int, taken: str) -> None:
    """Take the system's lock. Raises InputError, in the words `taken`, where another process has it.

    Where a file system has no locks (Lustre without `-o flock`), nobody is kept out.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(taken) from error
    except OSError:
        pass


def _is_still(handle: int, folder: Path) -> bool:
    """Whether an open folder still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked worker: with a handle of its own the lock would outlive the process that took it."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a growing file, without one that has no end."""
    return content.split(b"\n")[:-1]


def discard(folder: Path) -> None:
    """Removes a folder so that a kill half-way leaves no torn folder under its name."""
    _refuse_link(folder)
    doomed = hidden(folder, "partial")
    folder.replace(doomed)
    _remove(doomed)


def recover(parent: Path, name: str | None = None) -> list[str]:
    """Clears what dead processes left in `parent` (only of target `name`, if given); returns what was done.

    A partial copy is removed; a replaced one is put back if its target is missing. Leftovers that carry this
    process' own id count as dead (containers reuse ids), so call it only outside of `published` blocks.
    Only the process that writes in `parent` may call it: on another machine a living writer looks dead.
    """
    done = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or _lives_elsewhere(int(match["pid"])):
            continue
        target = parent / match["name"]
        if match["kind"] == "replaced" and not target.exists():
            path.replace(target)
            _sync(parent)
            done.append(f"put back {target.name}")
        else:
            _remove(path)
            done.append(f"removed the unfinished {match['kind']} copy of {target.name}")
    return done


def write_record(folder: Path) -> None:
    """Writes `complete.json`: size in bytes and sha256 of every file now under `folder`."""
    paths = [path for path in _files(folder) if path != folder / RECORD]
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    text = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def why_incomplete(folder: Path, *, hashes: bool = True) -> str | None:
    """None if `folder` holds every file its record names, whole; else the reason in words.

    Files the record does not name are neither opened nor counted. `hashes=False` compares sizes only.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "not a folder"
    files = _recorded_files(folder / RECORD)
    if files is None:
        return f"{RECORD} is missing or unreadable: the folder was not finished"
    for name, entry in files.items():
        path = folder / name
        if not _is_plain(name) or path.is_symlink() or not path.is_file():
            return f"{name} is missing or not a plain file"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} were written"
    if not hashes:
        return None
    for name, digest in zip(files, _digests([folder / name for name in files]), strict=True):
        if digest != files[name]["sha256"]:
            return f"{name} has changed since it was written (sha256 differs)"
    return None


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_name(place: str) -> str:
    """A hub id as it is, a local folder by its last name: where it lies is nobody else's business."""
    return Path(place).resolve().name if Path(place).exists() else place


def text_sha256(text: str) -> str:
    """Hexadecimal sha256 of a text in UTF-8, halves of surrogate pairs included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digests(paths: list[Path]) -> Iterator[str]:
    """The sha256 of each file, in order; several at a time, as a core hashes slower than a disk reads."""
    with ThreadPoolExecutor(HASHERS) as pool:
        yield from pool.map(sha256, paths)


def _recorded_files(path: Path) -> dict[str, dict[str, Any]] | None:
    """The record's files, or None where it is absent or not of our making."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        whole = all({"size", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if whole and files else None


def _is_plain(name: str) -> bool:
    """Whether a recorded name stays inside its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def file_in_the_way(folder: Path) -> Path | None:
    """What is there and no folder, of `folder` and those above it: then it cannot be made."""
    return next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)


def check_free(target: Path, replace: bool = False) -> None:
    """Refuse (`InputError`) a target that is a link or a file, or that exists and is not to be replaced."""
    _refuse_link(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; choose another folder or remove it")
    if target.exists() and not replace:
        raise InputError(f"{target} exists already; choose another name or remove it")


def check_ours(target: Path, ours: re.Pattern[str], what: str, other: str = "another --out") -> None:
    """Refuse (`InputError`) what is no folder of files named like `ours`: `what` replaces it as a whole.

    `other` is what to choose in its place.
    """
    check_free(target, replace=True)
    foreign = sorted(path.name for path in target.iterdir() if not ours.fullmatch(path.name)) if target.is_dir() else []
    if foreign:
        raise InputError(
            f"{target} holds {foreign[0]!r}, which is no part of {what}, and {what} replaces its folder; choose {other}"
        )


def check_file(path: Path) -> None:
    """Refuse (`InputError`) to write a file where a link, a folder, a device or a pipe is: it would be replaced."""
    _refuse_link(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe, and a file would take its place; give the name of a file")


def check_folder_of(path: Path) -> None:
    """Refuse (`InputError`) a file whose folder is not there, before anything is computed for it."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist. Make it first.")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link: links are never written through; give the real path")


def hidden(target: Path, kind: str, pid: int | None = None) -> Path:
    """Where the process `pid` (this one) keeps a copy of `target` that is not published: "partial" or "replaced"."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid() if pid is None else pid}")


def _lives_elsewhere(pid: int) -> bool:
    """Whether another living process has this id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*"))
    for path in paths:
        _refuse_link(path)
    return [path for path in paths if not path.is_dir()]


def _sync_tree(folder: Path) -> None:
    """Every file, then every folder from the leaves up, forced to disk; files as readable as the user's others.

    safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in _files(folder):
        path.chmod(0o666 & ~umask)
        _sync(path)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
