"""A session: questions until there are none, seeds, Ctrl-C, and one on a terminal of its own."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorafocal.chat import Session, chat
from lorafocal.chat.partner import meet
from lorafocal.chat.screen import text_so_far
from lorafocal.chat.streams import Drawing, TokenStream
from lorafocal.errors import InputError
from lorafocal.model.adapters import adapter_layers
from tests.saved_run import SavedRun, save_run
from tests.spoken import QUESTION, both, lines_read, spoken


def test_given_prompts_ask_no_questions_and_a_seed_fixes_their_answers(run: SavedRun) -> None:
    def never(_: str) -> str:
        raise AssertionError("asked")

    first = spoken(run.folder, QUESTION, "maximum 1 2", read=never)
    assert first.count("adapter on: run") == first.count("adapter off: the base base") == 2
    again = spoken(run.folder, "maximum 1 2", QUESTION, read=never)
    assert sorted(first.split("> ")) == sorted(part for part in again.split("> "))  # whatever was answered before
    assert spoken(run.folder, QUESTION, "maximum 1 2", seed=1) != first
    with pytest.raises(InputError, match="special token"):
        spoken(run.folder, "<|end|>")
    utf8 = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    with pytest.raises(InputError, match="cannot be read"):
        chat(run.folder, prompts=["half \udcff"], console=utf8)


def test_a_session_asks_until_nothing_is_asked(run: SavedRun) -> None:
    read = lines_read(
        "/help",
        QUESTION,
        "/seed 1",
        QUESTION,
        "/seed x",
        f"/seed {2**63}",
        "sort \\",
        "1 2",
        KeyboardInterrupt(),
        "sort <|end|>",
        " /x",
    )
    shown = spoken(run.folder, read=read)
    assert "Ctrl-C stops an answer" in shown
    assert shown.count("adapter on: run") == 4
    first, second = (part.partition("[adapter off")[0] for part in shown.split("[adapter on: run]")[1:3])
    assert first != second
    assert "there is no such command" in shown
    assert f"/seed is a whole number from 0 to 2^63, not {2**63}" in shown
    assert "Ctrl-D or an empty line leaves" in shown
    assert "special token '<|end|>'" in shown
    assert "adapter on" not in spoken(run.folder, read=lines_read("  ", QUESTION))


def test_answers_that_are_the_same_are_said_to_be(run: SavedRun, tmp_path: Path) -> None:
    same = "both answers are the same, token for token"
    weak = save_run(tmp_path, std=1e-6)
    assert same in spoken(weak.folder, QUESTION, temperature=0)
    assert same not in spoken(run.folder, QUESTION)


def interrupted(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, after: int) -> Callable[[], None]:
    """Send this process a signal within step `after` of the streams; returns what takes that back."""
    steps, step = [0], TokenStream.step

    def send(stream: TokenStream) -> None:
        steps[0] += 1
        if steps[0] == after:
            signal.raise_signal(number)
        step(stream)

    monkeypatch.setattr(TokenStream, "step", send)
    return lambda: monkeypatch.setattr(TokenStream, "step", step)


def test_ctrl_c_stops_an_answer_and_leaves_model_and_handlers_whole(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    partner = meet(run.folder)
    how = Drawing(6, 0.0, 0, partner.speech.ends(None))
    session = Session(partner, how, None, Console(file=out, highlight=False))
    interrupted(monkeypatch, signal.SIGINT, after=4)  # within the second token with the adapter off
    session.talk(lines_read(QUESTION, QUESTION))
    assert not any(layer.disable_adapters for layer in adapter_layers(partner.model))
    assert signal.getsignal(signal.SIGINT) is handler
    stopped, whole = out.getvalue().split("stopped\n")
    assert stopped.count("(2 tokens, stopped)") == 2
    assert "stopped" not in whole
    expected = both(partner.model, how, partner.speech.prompt_ids(QUESTION))
    assert all(text_so_far(partner.tokenizer, ids, finished=True) in whole for ids in expected)


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_given_prompts_end_with_the_signal(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, end: type[BaseException]
) -> None:
    interrupted(monkeypatch, number, after=2)
    with pytest.raises(end) as caught:
        spoken(run.folder, QUESTION, QUESTION)
    assert end is KeyboardInterrupt or caught.value.args == (128 + number,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        *({"temperature": value} for value in (-1.0, float("nan"), float("inf"), 1e-300)),
        {"seed": -1},
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
        chat(tmp_path, **wrong)


@pytest.fixture
def terminal(run: SavedRun) -> Iterator[SimpleNamespace]:
    """`lorafocal chat` on a pseudo-terminal: `write` types, `until` reads up to a text."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lorafocal", "chat", str(run.folder), "--temperature", "0", "--max-new-tokens"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}

    def take_terminal() -> None:
        """As a shell does, so that a typed Ctrl-C becomes a signal: one that tests in the background ignore."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*command, "5000"],
        preexec_fn=take_terminal,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
        close_fds=True,
    )
    os.close(slave)
    seen: list[str] = []

    def until(text: str, limit_s: float = 120, typed_again: str = "") -> str:
        deadline, start = time.monotonic() + limit_s, len("".join(seen))
        while text not in "".join(seen)[start:]:
            assert time.monotonic() < deadline, "".join(seen)[-2000:]
            if select.select([master], [], [], 2)[0]:
                try:
                    seen.append(os.read(master, 65536).decode(errors="replace"))
                except OSError:  # the other end is closed
                    break
            else:
                os.write(master, typed_again.encode())
        return "".join(seen)[start:]

    yield SimpleNamespace(process=process, until=until, write=lambda text: os.write(master, text.encode()))
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(master)


@pytest.mark.engine
def test_a_session_on_a_terminal(terminal: SimpleNamespace) -> None:
    terminal.until("> ")
    terminal.write(f"{QUESTION}\n")
    shown = terminal.until("maximum maximum")
    assert "adapter on: run" in shown
    assert "adapter off: the base base" in shown
    terminal.write("\x03")  # thousands of tokens before its end
    assert " tokens, stopped" in terminal.until("> ")
    terminal.write("\x03")  # Python may overlook one that comes just before it waits for a line
    terminal.until("Ctrl-D or an empty line leaves\r\n> ", typed_again="\x03")
    terminal.write("\x04")
    terminal.until("nothing more", typed_again="\x04")  # up to its end
    assert terminal.process.wait(60) == 0
