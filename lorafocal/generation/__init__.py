"""Answers to a file of prompts, from an adapter, a model or a server: `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafocal.endpoints import Approve, Endpoint, Price
from lorafocal.errors import InputError
from lorafocal.evaluate.result import package_versions
from lorafocal.generation.answering import answer_all, on_this_machine
from lorafocal.generation.asks import Completion, Engine
from lorafocal.generation.formats import (
    ALPACA,
    ARENA,
    AnswerRow,
    form_of,
    provenance_file,
    read_answers,
    read_provenance,
    write_answers,
)
from lorafocal.generation.journal import Journal, check_same, journal_file
from lorafocal.generation.presets import BATCH_TOKENS, PRESETS, Sampling, sampling_of
from lorafocal.generation.prompts import Prompt, Prompts, read_prompts
from lorafocal.generation.server import ServerEngine, Terms
from lorafocal.publish import check_folder_of, recover

PACKAGES = {
    "transformers": ("torch", "transformers", "peft", "bitsandbytes"),
    "vllm": ("torch", "transformers", "vllm"),
    "server": ("openai",),
}
"""By engine, those whose versions decide the answers."""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What a generation left: the file, how many answers, what was counted, and what made them."""

    out: Path
    answers: int
    engine: str
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def length_limit(self) -> int:
        """Answers that were cut at the limit of new tokens."""
        return self.counts["length_limit"]

    def as_dict(self) -> dict[str, Any]:
        """For another program."""
        return {**asdict(self), "out": str(self.out)}

    def table(self) -> str:
        """For a person: what there is now, and what a reader of it should know."""
        return "\n".join([str(self), *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        cut = f"; {self.length_limit} cut at the limit of new tokens" if self.length_limit else ""
        return f"{self.answers} answers by {self.engine} in {self.out}{cut}"


def generate(
    target: str | Path,
    prompts: Path,
    *,
    out: Path,
    preset: str = "greedy",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    system: str | None = None,
    base: str | None = None,
    server: Endpoint | None = None,
    price: Price | None = None,
    approve: Approve | None = None,
    engine: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    name: str | None = None,
    say: Callable[[str], None] = print,
) -> GenerationReport:
    """Answer the prompts of a file with `target`: a run, an adapter or model folder, or a model's hub id.

    With a `server`, `target` is only what the answers' model is called, and the endpoint's model answers, once
    `approve` (needed then) agreed to what that takes; `price` is USD for a million tokens read and written. `prompts`
    is any file that `read_prompts` reads; `out` gets AlpacaEval's form (.json) or, from Arena-Hard's questions,
    Arena-Hard's (.jsonl), and its provenance beside it. `preset` names one of `PRESETS`, whose values those that are
    given replace. `base` says where an adapter's base is. `engine` "auto" is vLLM where it is installed and can serve
    the target, and transformers otherwise. `name` is what the answers' model is called in the file.

    Answers are kept batch by batch beside `out`: after a kill, the same call goes on, and its file is that of a call
    that was not interrupted. A call for a file that is there already returns at once.

    Raises InputError for anything missing or unfit, before weights are loaded or anything is sent where that can be
    known, and for a call with other settings than the one that it would go on with.
    """
    out = Path(out)
    sampling = sampling_of(
        preset,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        system=system,
    )
    asked = read_prompts(prompts)
    _check_out(out, asked)
    replies = out.with_name(f"{out.stem}.replies.jsonl")
    if server is None:
        machine, why = on_this_machine(target, sampling, base=base, engine=engine, batch_tokens=batch_tokens)
    else:
        machine, why = _at_server(server, sampling, Terms(replies, price, approve), base, engine, say)
    called = name or (str(target) if server is not None else str(machine.target["name"]))
    about = _about(machine, called, preset, sampling, asked)
    for file in (out, provenance_file(out), journal_file(out)):
        recover(out.parent, file.name)
    if (finished := _finished(out, about)) is not None:
        say(f"{out} is there already, made with these very settings")
        return GenerationReport(
            out, len(asked.rows), machine.name, finished["counts"], tuple(finished.get("notes", ()))
        )
    say(why)
    if PRESETS[preset].note:
        say(f"{preset}: {PRESETS[preset].note}")
    with Journal(journal_file(out), about) as journal:
        given = answer_all(machine, sampling.system, asked.rows, journal, say)
        rows = [_row(prompt, answers, called) for prompt, answers in zip(asked.rows, given, strict=True)]
        counts = _counts(asked, given)
        write_answers(out, rows, {**about, "counts": counts, "notes": [*machine.notes]})
        replies.unlink(missing_ok=True)
        journal.remove()
    return GenerationReport(out, len(rows), machine.name, counts, machine.notes)


def _about(machine: Engine, called: str, preset: str, sampling: Sampling, asked: Prompts) -> dict[str, Any]:
    """All that decides the answers, as the journal and the provenance hold it."""
    published = PRESETS[preset].sampling.as_dict()
    changed = sorted(key for key, value in sampling.as_dict().items() if key != "seed" and value != published[key])
    drawn = {"preset": preset, "changed": changed, "source": PRESETS[preset].source, **sampling.as_dict()}
    return {
        "target": {**machine.target, "generator": called},
        "sampling": {**drawn, "engine": machine.name, **machine.settings},
        "prompts": asked.as_dict(),
        "versions": package_versions(*PACKAGES[machine.name]),
    }


def _check_out(out: Path, asked: Prompts) -> None:
    """That the form of answers that the name of `out` asks for can hold these, in a folder that is there."""
    check_folder_of(out)
    form = form_of(out)
    about = provenance_file(out)
    if about.is_file() and (other := read_provenance(about)["answers"].get("file")) != out.name:
        raise InputError(f"{out}: {about.name} describes {other} already; give these answers another name or folder")
    if form == ARENA and asked.form != "arena-hard":
        raise InputError(
            f"{out}: .jsonl is Arena-Hard's form, which names questions by their ids, and {asked.file} has none: let"
            " --out end in .json"
        )
    longer = next((prompt for prompt in asked.rows if prompt.later), None)
    if form == ALPACA and longer is not None:
        raise InputError(f"{longer.place}: a question of several turns has no place in AlpacaEval's form: use .jsonl")


def _at_server(
    server: Endpoint, sampling: Sampling, terms: Terms, base: str | None, engine: str, say: Callable[[str], None]
) -> tuple[Engine, str]:
    """A server as the engine. Raises InputError for options that are of this machine."""
    if base is not None:
        raise InputError("--base says where an adapter's base is, and a server has its own: leave it out")
    if engine != "auto":
        raise InputError("--engine is for answers on this machine, and with --server none is made here: leave it out")
    return ServerEngine(server, sampling, terms, say=say), f"answers by a server, as {server.model}"


def _finished(out: Path, about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The provenance of a file that is there already; None where it is not, or not yet with its provenance.

    Raises InputError where it is something else than what was asked for.
    """
    if not out.exists() or journal_file(out).is_file():
        return None
    before = read_answers(out).provenance
    if before is None:
        raise InputError(
            f"{out} exists, and nothing beside it says how it was made: choose another --out, or remove it"
        )
    check_same({key: before[key] for key in about}, about, provenance_file(out))
    return before


def _counts(asked: Prompts, given: Sequence[Sequence[Completion]]) -> dict[str, int]:
    answers = [answer for turns in given for answer in turns]
    return {
        "answers": len(answers),
        "length_limit": sum(not answer.ended for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
        "repeated_prompts": asked.repeated,
    }


def _row(prompt: Prompt, answers: Sequence[Completion], called: str) -> AnswerRow:
    return AnswerRow(
        output=answers[-1].text,
        generator=called,
        instruction=prompt.instruction,
        dataset=prompt.dataset,
        question_id=prompt.question_id,
        turns=tuple(answer.text for answer in answers),
        tokens=tuple(answer.tokens for answer in answers),
    )
