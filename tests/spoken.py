"""Answers to compare with: transformers' own, and what `chat` prints of ours."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorafocal.chat import chat
from lorafocal.chat.streams import Drawing, TokenStream, in_turn
from lorafocal.model.adapters import AdapterSwitch

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
QUESTION = "sort 3 1 2"


def drawing(temperature: float = 0.0, *, seed: int = 3, tokens: int = 24, ends: set[int] | None = None) -> Drawing:
    return Drawing(tokens, temperature, seed, frozenset({1} if ends is None else ends))


def generated(model: Any, how: Drawing, prompt: list[int] = PROMPT) -> list[int]:
    """The oracle: transformers' own `generate`."""
    sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(how.seed)
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=how.max_new_tokens,
        eos_token_id=sorted(how.ends),
        pad_token_id=0,
        use_cache=True,
        **(sampling if how.temperature else {"do_sample": False}),
    )
    return output[0, len(prompt) :].tolist()


def both(policy: Any, how: Drawing, prompt: list[int] = PROMPT) -> tuple[list[int], list[int]]:
    """The answers with the adapter on and off, drawn in turn."""
    on, off = TokenStream(policy, prompt, how), TokenStream(policy, prompt, how)
    for _ in in_turn([(on, nullcontext), (off, AdapterSwitch(policy).off)]):
        pass
    return on.ids, off.ids


def spoken(target: Path, *prompts: str, terminal: bool = False, width: int = 100, **options: Any) -> str:
    """What a call prints."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=30, highlight=False, color_system=None)
    chat(target, prompts=prompts, console=console, **({"max_new_tokens": 6} | options))
    return out.getvalue()


def lines_read(*lines: Any) -> Callable[[str], str]:
    """A reader that gives these, raises those that are exceptions, and then has no more."""
    rest = iter(lines)

    def read(_: str) -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read
