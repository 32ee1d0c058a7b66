"""One prompt at a time in the terminal, answered with the adapter on and off side by side."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lorafocal.chat.partner import Partner, meet
from lorafocal.chat.screen import Answer, Screen, text_so_far
from lorafocal.chat.streams import Drawing, TokenStream, in_turn
from lorafocal.errors import InputError
from lorafocal.generation.presets import COLDEST, HOTTEST
from lorafocal.generation.subject import check_room
from lorafocal.interrupt import StopOnSignal
from lorafocal.model.head import causal_lm

HELP = """\
Write a prompt; a line that ends with \\ goes on in the next one. Each prompt stands alone.
/seed N   draw with another seed; the same prompt and seed give the same answer
/help     this text
Ctrl-C stops an answer. Ctrl-D or an empty line leaves. A prompt that begins with / gets a blank before it."""


def chat(
    target: Path,
    *,
    base: str | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    system: str | None = None,
    console: Console | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Answer prompts with the run or adapter folder `target`, its adapter on and off in turn, token by token.

    With `prompts` they are answered in order and no question is asked; without, `read` is asked for them until it
    raises EOFError or gives an empty line. Both answers to a prompt draw with the same random numbers, from `seed`
    anew for every prompt; `temperature` 0 is greedy. A merged model's folder has one column. `base` says where an
    adapter's base is, as in a merge; `system` is a system message.

    Raises InputError for settings that cannot be, for what cannot be loaded, and for one of `prompts` that cannot be
    answered; one that was read is refused on the screen.
    """
    _check(max_new_tokens, temperature, seed)
    console = console or Console(highlight=False, markup=False, emoji=False)
    partner = meet(target, base=base)
    if system is not None and not partner.speech.templated:
        raise InputError("--system needs a chat template, and these prompts are plain text: put it into the prompt")
    ends = partner.speech.ends(getattr(causal_lm(partner.model), "generation_config", None))
    session = Session(partner, Drawing(max_new_tokens, temperature, seed, ends), system, console)
    session.note(*partner.notes)
    if prompts:
        for prompt in prompts:
            session.say(f"> {prompt}")
            session.answer(prompt)
    else:
        session.talk(read)


def _check(max_new_tokens: int, temperature: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is 1 or more, not {max_new_tokens}")
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise InputError(f"--temperature is 0 (greedy) or from {COLDEST:g} to {HOTTEST:g}, not {temperature}")
    _check_seed("--seed", seed)


def _check_seed(where: str, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"{where} is a whole number from 0 to 2^63, not {seed}")


class Session:
    """A partner, how tokens are drawn, and the screen."""

    def __init__(self, partner: Partner, drawing: Drawing, system: str | None, console: Console) -> None:
        self._partner, self._drawing, self._system, self._console = partner, drawing, system, console

    def say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(Text(line.encode(errors="replace").decode()), soft_wrap=True)  # bytes that are no UTF-8

    def note(self, *lines: str) -> None:
        for line in lines:
            self._console.print(Text(f"note: {line}", style="dim"), soft_wrap=True)

    def talk(self, read: Callable[[str], str]) -> None:
        """Ask, answer, and again, until nothing more is asked."""
        if self._console.is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - `input` then edits lines and remembers them
            self.say("an empty line leaves, /help says what can be written here")
        while prompt := self._asked(read):
            try:
                if prompt.startswith("/"):
                    self._command(*prompt[1:].split())
                else:
                    self.answer(prompt.removeprefix(" ") if prompt.startswith(" /") else prompt)
            except InputError as error:
                self.say(str(error))
            except KeyboardInterrupt:
                self.say("stopped")

    def _asked(self, read: Callable[[str], str]) -> str:
        """A prompt of one or more lines; empty where there are no more."""
        lines: list[str] = []
        while True:
            try:
                lines.append(read(("... " if lines else "> ") if self._console.is_terminal else ""))
            except EOFError:
                return "\n".join(lines)
            except KeyboardInterrupt:
                self.say("", "Ctrl-D or an empty line leaves")
                lines.clear()
                continue
            if not lines[-1].endswith("\\"):
                prompt = "\n".join(lines)
                return prompt if prompt.strip() else ""
            lines[-1] = lines[-1][:-1]

    def _command(self, name: str = "", *values: str) -> None:
        if name == "help":
            self.say(HELP)
        elif name == "seed" and len(values) == 1 and values[0].isdecimal():
            seed = int(values[0])
            _check_seed("/seed", seed)
            self._drawing = replace(self._drawing, seed=seed)
        else:
            raise InputError("there is no such command; /help lists them (and a blank before the / makes it a prompt)")

    def answer(self, prompt: str) -> None:
        """Stream the answers to one prompt. Ctrl-C ends them after the token in the making: the model is then whole."""
        partner, drawing = self._partner, self._drawing
        ids = partner.speech.prompt_ids(prompt, self._system)
        check_room(partner.model, len(ids), drawing.max_new_tokens)
        streams = [TokenStream(partner.model, ids, drawing) for _ in partner.voices]
        stop = StopOnSignal()
        with Screen(self._console) as screen, stop.watching():
            screen.show(self._answers(streams, finished=False))
            for _ in in_turn([(stream, voice.state) for stream, voice in zip(streams, partner.voices, strict=True)]):
                if screen.due:
                    screen.show(self._answers(streams, finished=False))
                if stop.heard is not None:
                    break
            screen.show(self._answers(streams, finished=True))
        if len(streams) > 1 and all(stream.ids == streams[0].ids for stream in streams) and streams[0].done:
            self.note("both answers are the same, token for token")
        if stop.heard in (signal.SIGTERM, signal.SIGHUP):
            raise SystemExit(128 + stop.heard)
        if stop.heard is not None:
            raise KeyboardInterrupt

    def _answers(self, streams: Sequence[TokenStream], *, finished: bool) -> list[Answer]:
        return [
            Answer(
                voice.title,
                text_so_far(self._partner.tokenizer, stream.ids, finished=finished or stream.done),
                _ending(stream, finished=finished),
            )
            for voice, stream in zip(self._partner.voices, streams, strict=True)
        ]


def _ending(stream: TokenStream, *, finished: bool) -> str:
    """Why an answer ends where it does; nothing while it goes on."""
    tokens = f"{len(stream.ids)} token{'' if len(stream.ids) == 1 else 's'}"
    if stream.stopped:
        return tokens
    if stream.done:
        return f"{tokens}, cut at --max-new-tokens"
    return f"{tokens}, stopped" if finished else ""
