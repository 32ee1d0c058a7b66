"""A published folder is whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lorafocal import publish as publish_module
from lorafocal.errors import InputError
from lorafocal.publish import (
    RECORD,
    GrowingFile,
    alone_in,
    check_name,
    discard,
    full_disk_named,
    inside,
    published,
    recover,
    why_incomplete,
    write_atomically,
)
from tests.killing import moments

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"  # as safetensors says it
TOO_LARGE = "Error while serializing: I/O error: File too large (os error 27)"
DEAD_PID = 2**22 + 1  # above the largest id Linux gives out


def publish(target: Path, content: str, *, replace: bool = False, record: bool = True) -> None:
    with published(target, replace=replace, record=record) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "b.bin").write_bytes(content.encode() * 1000)


def publish_half(target: Path, error: type[BaseException]) -> None:
    with published(target, replace=True) as folder:
        (folder / "a.txt").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.row("55", "F9")
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replacing"])
def test_killed_at_every_file_operation_leaves_the_old_or_the_new(tmp_path: Path, replace: bool) -> None:
    seen, target = [], tmp_path / "checkpoint-2"
    if replace:
        publish(target, "old")
    for was_killed in moments(lambda: publish(target, "new", replace=True), tmp_path):
        recover(tmp_path)
        assert names(tmp_path) in ([], ["checkpoint-2"])
        assert why_incomplete(target) is None or not (replace or target.exists())
        seen.append((target / "a.txt").read_text() if target.exists() else "absent")
        if was_killed and seen[-1] == "new":
            discard(target)
            if replace:
                publish(target, "old")
    assert set(seen) == {"old" if replace else "absent", "new"}
    assert seen[-1] == "new"
    assert len(seen) > 20


def test_killed_while_a_file_is_replaced(tmp_path: Path) -> None:
    path, seen = tmp_path / "manifest.json", []
    write_atomically(path, "old")
    for was_killed in moments(lambda: write_atomically(path, "new" * 1000), tmp_path):
        seen.append(path.read_text())
        recover(tmp_path)
        assert names(tmp_path) == ["manifest.json"]
        if was_killed:
            write_atomically(path, "old")
    assert set(seen) == {"old", "new" * 1000}
    assert seen[-1] == "new" * 1000
    assert len(seen) > 4


def test_record_lists_every_file_and_is_left_out_on_request(tmp_path: Path) -> None:
    publish(tmp_path / "with", "x")
    assert set(json.loads((tmp_path / "with" / RECORD).read_text())["files"]) == {"a.txt", "deep/er/b.bin"}
    publish(tmp_path / "without", "x", record=False)
    assert names(tmp_path / "without") == ["a.txt", "deep"]
    assert "not finished" in str(why_incomplete(tmp_path / "without"))


def test_an_exception_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish(target, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            publish_half(target, error)
    assert names(tmp_path) == ["adapter"]
    assert (target / "a.txt").read_text() == "old"


def test_a_failed_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    publish(target, "old")
    real = Path.replace

    def full_disk(self: Path, to: Path) -> Path:
        if "partial" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, to)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        publish(target, "new", replace=True)
    assert names(tmp_path) == ["adapter"]
    assert why_incomplete(target) is None
    assert (target / "a.txt").read_text() == "old"


def test_an_existing_target_is_never_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish(target, "old")
    with pytest.raises(InputError, match="exists already"):
        publish(target, "new")
    (tmp_path / "file").write_text("x")
    for replace in (False, True):
        with pytest.raises(InputError, match="is a file"):
            publish(tmp_path / "file", "new", replace=replace)
    with pytest.raises(InputError, match="exists already"), published(tmp_path / "late"):
        (tmp_path / "late").mkdir()  # somebody else was faster
    assert names(tmp_path) == ["adapter", "file", "late"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "record"])
def test_any_damage_is_seen(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "checkpoint-2"
    publish(target, "x")
    victim = target / "deep" / "er" / "b.bin"
    data = bytearray(victim.read_bytes())
    match damage:
        case "flip":
            data[500] ^= 1
            victim.write_bytes(data)
        case "truncate":
            victim.write_bytes(data[:-1])
        case "remove":
            victim.unlink()
        case "link":
            victim.rename(tmp_path / "elsewhere")
            victim.symlink_to(tmp_path / "elsewhere")
        case "record":
            (target / RECORD).write_text((target / RECORD).read_text()[:-30])
    reason = why_incomplete(target)
    assert reason is not None
    assert ("complete.json" if damage == "record" else "b.bin") in reason
    assert (why_incomplete(target, hashes=False) is None) == (damage == "flip")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deep/../../outside"])
def test_a_record_cannot_point_outside(tmp_path: Path, name: str) -> None:
    target = tmp_path / "checkpoint-2"
    publish(target, "x")
    (tmp_path / "outside").write_text("x")
    (target / RECORD).write_text(json.dumps({"files": {name: {"size": 1, "sha256": "0"}}}))
    assert "not a plain file" in str(why_incomplete(target))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}', "\x00"])
def test_an_alien_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    assert "not finished" in str(why_incomplete(tmp_path))


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    publish(tmp_path / ".checkpoint-1.replaced-999", "put back")
    (tmp_path / ".checkpoint-1.replaced-999").rename(tmp_path / f".checkpoint-1.replaced-{DEAD_PID}")
    (tmp_path / f".checkpoint-2.partial-{DEAD_PID}").mkdir()
    (tmp_path / f".manifest.json.partial-{DEAD_PID}-0123abcd").write_text("half")
    (tmp_path / f".checkpoint-4.partial-{os.getpid()}").mkdir()  # a container gave our id to the one before us
    (tmp_path / f".checkpoint-3.partial-{os.getppid()}").mkdir()
    (tmp_path / ".hidden").mkdir()
    done = recover(tmp_path)
    assert names(tmp_path) == [f".checkpoint-3.partial-{os.getppid()}", ".hidden", "checkpoint-1"]
    assert len(done) == 4
    assert "put back checkpoint-1" in done
    assert recover(tmp_path) == []
    assert recover(tmp_path / "absent") == []


def test_containers_whose_programs_are_all_process_1_write_one_file_at_once(tmp_path: Path, monkeypatch) -> None:
    file, others = tmp_path / "part", iter(["theirs"])
    monkeypatch.setattr(publish_module, "_sync", lambda path: [write_atomically(file, other) for other in others])
    write_atomically(file, "ours")
    assert (names(tmp_path), file.read_text()) == (["part"], "ours")


def test_publishing_clears_leftovers_of_its_own_target_only(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f".checkpoint-{step}.partial-{DEAD_PID}").mkdir()
    publish(tmp_path / "checkpoint-2", "x")
    assert names(tmp_path) == [f".checkpoint-1.partial-{DEAD_PID}", "checkpoint-2"]


@pytest.mark.row("S9")
def test_links_are_never_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (tmp_path / "folder").symlink_to(outside)
    (tmp_path / "file").symlink_to(outside / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "dangling"):
        with pytest.raises(InputError, match="symbolic link"):
            publish(tmp_path / name, "x", replace=True)
        with pytest.raises(InputError, match="symbolic link"):
            discard(tmp_path / name)
        with pytest.raises(InputError, match="symbolic link"):
            inside(tmp_path, name)
    with pytest.raises(InputError, match="symbolic link"):
        write_atomically(tmp_path / "file", "x")
    with pytest.raises(InputError, match="symbolic link"):
        GrowingFile(tmp_path / "file")
    with pytest.raises(InputError, match="symbolic link"), published(tmp_path / "new") as folder:
        (folder / "link").symlink_to(outside / "file")
    assert (outside / "file").read_text() == "precious"
    assert names(outside) == ["file"]


def test_a_file_takes_the_place_of_nothing_but_a_file(tmp_path: Path) -> None:
    """A pipe stands for devices: as root, a file would take the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "pipe is a device or a pipe"), ("folder", "folder is a folder: name a file in it")):
        with pytest.raises(InputError, match=message):
            write_atomically(tmp_path / name, "x")
        with pytest.raises(InputError, match=message):
            GrowingFile(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize("kept", range(1, 9))
def test_a_growing_file_holds_whole_lines_wherever_a_kill_tore_it(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "deep" / "lines.jsonl"
    file = GrowingFile(path)
    file.add({"a": "\n"})
    file.add({"b": 2})
    with pytest.raises(InputError, match=r"lines\.jsonl is being written by another process"):
        GrowingFile(path)
    file.close()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-kept])
    again = GrowingFile(path)
    again.add({"b": 3})
    again.close()
    assert again.lines == [first.strip()]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": "\n"}, {"b": 3}]


def test_a_growing_file_where_none_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        GrowingFile(tmp_path / "file" / "lines.jsonl")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError(FULL), "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), r"File too large \(for ulimit -f, or for its file system\)"),
        (SafetensorError(TOO_LARGE), r"File too large \(for ulimit -f, or for its file system\)"),
    ],
)
def test_a_full_disk_is_told_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def full(*_: object) -> None:
        raise error

    with pytest.raises(OSError, match=rf"{words}: '{tmp_path}/folder'"), published(tmp_path / "folder"):
        full()
    file = GrowingFile(tmp_path / "lines")
    monkeypatch.setattr("lorafocal.publish.os.fsync", full)
    with pytest.raises(OSError, match=rf"{words}: '{tmp_path}/file'"):
        write_atomically(tmp_path / "file", "x")
    with pytest.raises(OSError, match=rf"{words}: '{tmp_path}/lines'"):
        file.add({})
    file.close()
    assert names(tmp_path) == ["lines"]


def test_a_full_disk_is_where_a_copy_was_written_not_what_was_copied(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'target'"), full_disk_named(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, "target")  # as shutil.copyfile does


@pytest.mark.parametrize("error", [OSError("cannot load this"), SafetensorError("torn"), OSError(errno.EIO, "bad")])
def test_no_other_error_is_told_so(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
        raise error
    assert caught.value is error


def test_a_folder_that_is_gone_before_it_is_opened_is_said_to_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was replaced by another process"), alone_in(tmp_path / "run", "swept"):
        pytest.fail("is not alone in a folder that is not there")


def test_a_process_is_alone_in_a_folder_until_it_ends_however_it_does(tmp_path: Path) -> None:
    with alone_in(tmp_path, "swept"):
        with (
            pytest.raises(InputError, match="is being trained in by another process: wait"),
            alone_in(tmp_path, "trained in"),
        ):
            pass
        with pytest.raises(InputError, match="by another process"), alone_in(tmp_path, "swept"):  # nor did that free it
            pass
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with alone_in(tmp_path, "swept"):
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(InputError, match="by another process"), alone_in(tmp_path, "swept"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with alone_in(tmp_path, "swept"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_forked_worker_that_outlives_the_work_keeps_no_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path, "trained in"):
        worker = os.fork()
        if worker == 0:
            signal.pause()
    try:
        with alone_in(tmp_path, "trained in"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_forked_worker_that_outlives_a_killed_process_keeps_no_folder(tmp_path: Path) -> None:
    """Data workers look for their parent every few seconds, and a run is resumed at once."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with alone_in(tmp_path, "trained in"):
            worker = os.fork()
            if worker != 0:
                os.write(told, worker.to_bytes(8, "little"))
            signal.pause()
        os._exit(0)
    worker = int.from_bytes(os.read(ready, 8), "little")
    with pytest.raises(InputError, match="by another process"), alone_in(tmp_path, "trained in"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with alone_in(tmp_path, "trained in"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_where_a_file_system_has_no_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("lorafocal.publish.fcntl.flock", unlockable)
    with alone_in(tmp_path, "trained in"):
        pass
    file = GrowingFile(tmp_path / "lines.jsonl")
    file.add({"a": 1})
    file.close()
    assert (tmp_path / "lines.jsonl").read_text() == '{"a": 1}\n'


EVIL_NAMES = [
    *(
        "",
        ".",
        "..",
        ".hidden",
        "../x",
        "x/y",
        "/x",
        "/",
        "x/",
        "./x",
        "x\\y",
        "..\\x",
        "C:x",
        "~",
        "~root",
        "$HOME",
    ),
    *(
        "x\n",
        "x\0y",
        "x y",
        " x",
        "X",
        "é",
        "x:y",
        "x*",
        "x?",
        "%2e%2e",
        "a" * 65,
        "-rf ",
        "x;y",
        "x|y",
        "．．",
        "x\t",
    ),
]


@pytest.mark.row("S9")
@pytest.mark.parametrize("name", EVIL_NAMES)
def test_evil_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        check_name(name)
    with pytest.raises(InputError, match="cannot be a name"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "quickstart", "llama3-8b_r128.v2", "a" * 64, "0"])
def test_plain_names_pass(tmp_path: Path, name: str) -> None:
    assert check_name(name) == name
    assert inside(tmp_path, name) == tmp_path / name


def test_write_atomically_takes_text_and_bytes_and_leaves_no_trace(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "grün")
    write_atomically(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a"]
