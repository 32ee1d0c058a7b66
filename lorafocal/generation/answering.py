"""The engine that answers, and all prompts' answers from it, batch by batch through the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorafocal.errors import InputError
from lorafocal.generation.asks import Ask, Completion, Engine
from lorafocal.generation.journal import Journal
from lorafocal.generation.presets import Sampling
from lorafocal.generation.prompts import Prompt

ENGINES = ("auto", "transformers", "vllm")
REPORTS = 20  # lines of progress


def on_this_machine(
    target: str | Path, sampling: Sampling, *, base: str | None, engine: str, batch_tokens: int
) -> tuple[Engine, str]:
    """Transformers, or vLLM where that is asked for, or installed and able to; and in words why.

    Raises InputError for what cannot be found, and for a vLLM that was asked for and cannot.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {' or '.join(ENGINES)}, not {engine!r}")
    from lorafocal.generation.local import TransformersEngine  # brings torch, which readers do without
    from lorafocal.generation.subject import find_subject
    from lorafocal.generation.vllm import VllmEngine, hindrance

    subject = find_subject(target, base=base)
    why_not = "as asked for" if engine == "transformers" else hindrance(subject)
    if engine == "vllm" and why_not is not None:
        raise InputError(f"vLLM cannot answer here: {why_not}. Leave --engine out to have transformers answer")
    if why_not is None:
        return VllmEngine(subject, sampling), "answers by vLLM"
    return TransformersEngine(subject, sampling, batch_tokens), f"answers by transformers ({why_not})"


def answer_all(
    engine: Engine, system: str | None, prompts: Sequence[Prompt], journal: Journal, say: Callable[[str], None]
) -> list[list[Completion]]:
    """Every turn of every prompt, the later ones after the answers to the earlier; what the journal has is not asked.

    The batches of a turn are a function of all its prompts, so that a second start computes the very same ones.
    """
    given: list[list[Completion]] = [[] for _ in prompts]
    total = sum(1 + len(prompt.later) for prompt in prompts)
    if journal.done:
        say(f"{len(journal.done)} of {total} answers are there already")
    for turn in range(max(1 + len(prompt.later) for prompt in prompts)):
        asks = [
            Ask((place, turn), conversation(prompt, given[place], system), prompt.place)
            for place, prompt in enumerate(prompts)
            if turn <= len(prompt.later)
        ]
        batches = engine.plan(asks)
        missing = [batch for batch in batches if not all(ask.key in journal.done for ask in batch)]
        for number, batch in enumerate(missing, start=1):
            journal.add([ask.key for ask in batch], engine.answer(batch))
            if number % math.ceil(len(missing) / REPORTS) == 0 or number == len(missing):
                say(f"{len(journal.done)} of {total} answers")
        for ask in asks:
            given[ask.key[0]].append(journal.done[ask.key])
    return given


def conversation(prompt: Prompt, earlier: Sequence[Completion], system: str | None) -> tuple[Mapping[str, str], ...]:
    """What is asked after `earlier` answers, the system message first. Raises InputError where there are two."""
    messages = [dict(message) for message in prompt.messages]
    if system is not None:
        if messages[0]["role"] == "system":
            raise InputError(
                f"{prompt.place}: the prompt has a system message of its own: leave --system out, and take a preset"
                " without one"
            )
        messages.insert(0, {"role": "system", "content": system})
    for answer, text in zip(earlier, prompt.later, strict=False):
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": text}]
    return tuple(messages)
