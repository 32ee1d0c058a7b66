"""Answers on the screen: in columns side by side while they are made, or one after the other where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

REDRAW_S = 0.05  # decoding and drawing at every token would slow a fast model down
NARROWEST = 40  # columns of the terminal: two answers in less are hard to read
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for a part of a character's bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as far as it is known; `ending` says why it stopped, empty while it goes on."""

    title: str
    text: str
    ending: str = ""


def text_so_far(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, finished: bool) -> str:
    """The answer's text, without special tokens. A character of which bytes are still to come waits for them."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return printable(text if finished else text.rstrip(INCOMPLETE))


def printable(text: str) -> str:
    """The text with every control character but line feeds and tabs made visible: a model may write escape codes."""
    visible = "".join(c if c in "\n\t" or not _is_control(c) else _picture(c) for c in text.replace("\r\n", "\n"))
    return visible.expandtabs(4)


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def _picture(character: str) -> str:
    """Unicode's picture of a control character; those without one become a replacement character."""
    return chr(0x2400 + ord(character)) if character < " " else INCOMPLETE


class Columns:
    """Answers beside each other, as tall as they are; while live, their last lines as far as the screen has room."""

    def __init__(self, answers: Sequence[Answer], *, live: bool) -> None:
        self._answers, self._live = answers, live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self._answers)
        width = (options.max_width - 3 * (count - 1)) // count
        columns = [list(Text(answer.text).wrap(console, width)) for answer in self._answers]
        room = console.size.height - 4  # title, rule, ending and the cursor's line
        if self._live:
            columns = [lines[-max(room, 1) :] for lines in columns]
        table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
        for _ in self._answers:
            table.add_column(width=width, no_wrap=True, overflow="fold")
        table.add_row(*(Text(answer.title, style="bold", overflow="ellipsis") for answer in self._answers))
        table.add_row(*(Rule(style="dim") for _ in self._answers))
        table.add_row(*(Text("\n").join(lines) for lines in columns))
        table.add_row(*(Text(answer.ending, style="dim", overflow="ellipsis") for answer in self._answers))
        yield Group(table)


class Screen:
    """Shows the answers to one prompt, within its context: as they grow on a terminal, else once, when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: Sequence[Answer] = ()
        self._drawn_s = -REDRAW_S
        live = console.is_terminal and console.size.width >= NARROWEST
        self._display = Live(console=console, auto_refresh=False, transient=False) if live else None

    def __enter__(self) -> Screen:
        if self._display is not None:
            self._display.start()
        return self

    @property
    def due(self) -> bool:
        """Whether somebody watches, and has seen the last drawing for a moment."""
        return self._display is not None and time.monotonic() - self._drawn_s >= REDRAW_S

    def show(self, answers: Sequence[Answer]) -> None:
        self._last = answers
        if self._display is not None:
            self._display.update(Columns(answers, live=True), refresh=True)
            self._drawn_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.update(Columns(self._last, live=False))
            self._display.stop()
            return
        for answer in self._last:
            ending = f" ({answer.ending})" if answer.ending else ""
            self._console.print(Text(f"[{answer.title}]{ending}"), soft_wrap=True)
            self._console.print(Text(answer.text), soft_wrap=True)
