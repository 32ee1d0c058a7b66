"""An answers file judged by a rule: the share of right answers with its interval, and each prompt's verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.data.messages import contents
from lorafocal.data.readers import read_rows
from lorafocal.data.sources import read_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.intervals import share
from lorafocal.evaluate.result import Result, file_hashes, package_versions, prompt_sha256
from lorafocal.evaluate.rules import Rule, rule_named
from lorafocal.generation.formats import AnswerRow, Answers, read_answers
from lorafocal.generation.prompts import Prompt, prompt_of, read_prompts

TARGET, CHOSEN = "target", "chosen"
Verdict = Callable[[str, str], bool]  # instruction and answer -> whether that is right


def evaluate_rule(
    answers: Path,
    *,
    rule: str | Verdict,
    targets: Path | None = None,
    field: str = TARGET,
    pattern: str | None = None,
    keys: Sequence[str] = (),
) -> Result:
    """The share of the answers in a file of AlpacaEval's form that a rule calls right, with Wilson's interval.

    `rule` is one of `rules.RULES` (`pattern` and `keys` are theirs), or a function of instruction and answer. A rule
    that compares reads targets from `targets`, a file of prompts of any form that `generate` reads: `field` is the
    rows' own key (a text or a number), or "chosen" for the chosen answer of preference rows. Raises InputError for an
    answer whose prompt has no target or two different ones, and for what the rule would not read.
    """
    read = read_answers(answers)
    judged = _verdicts(read, rule, pattern, keys, targets, field)
    right = share(judged)
    name = rule if isinstance(rule, str) else rule.__name__
    compared = {} if targets is None else {"field": field}
    return Result(
        benchmark="rule",
        model=read.generator,
        scores={"right": right.percent},
        sampling=read.sampling,
        target=read.target,
        counts={**read.counts, "answers": right.total, "right_answers": sum(judged)},
        settings={"rule": name, "pattern": pattern, "keys": list(keys), **compared},
        inputs=file_hashes(answers, *([] if targets is None else [targets])),
        versions=package_versions(),
        notes=_notes(read),
        items=tuple(
            {"prompt_sha256": prompt_sha256(_instruction(read, row)), "right": verdict}
            for row, verdict in zip(read.rows, judged, strict=True)
        ),
    )


def _verdicts(
    read: Answers,
    rule: str | Verdict,
    pattern: str | None,
    keys: Sequence[str],
    targets: Path | None,
    field: str,
) -> list[bool]:
    asked = [_instruction(read, row) for row in read.rows]
    texts = [row.output for row in read.rows]
    if not isinstance(rule, str):
        if pattern is not None or keys or targets is not None:
            raise InputError("pattern, keys and targets belong to the named rules; a function reads none of them")
        return [rule(instruction, text) for instruction, text in zip(asked, texts, strict=True)]
    named = rule_named(rule, pattern=pattern, keys=keys)
    if not named.needs_target:
        if targets is not None:
            raise InputError(f"the rule {rule} reads no targets here: leave {targets} out")
        return [named.holds(text, "") for text in texts]
    if targets is None:
        raise InputError(f"the rule {rule} compares with a target: name a file of prompts that has them by --targets")
    return _against_targets(named, asked, texts, read_targets(targets, field), f"{targets}: {field}")


def _against_targets(
    rule: Rule, asked: Sequence[str], texts: Sequence[str], targets: Mapping[str, str], source: str
) -> list[bool]:
    if missing := [number for number, instruction in enumerate(asked, start=1) if instruction not in targets]:
        raise InputError(
            f"{source}: {len(missing)} of {len(asked)} answers have no target there, the first being answer"
            f" {missing[0]}: give the file of prompts that they were generated from"
        )
    try:
        return [rule.holds(text, targets[instruction]) for instruction, text in zip(asked, texts, strict=True)]
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def read_targets(path: Path, field: str = TARGET) -> dict[str, str]:
    """Right answers by prompt: `field` of each row of a file of prompts; of a chosen completion its first turn.

    Raises InputError naming the row that has none, or that contradicts an earlier one.
    """
    targets: dict[str, str] = {}
    for prompt, value in _stated(path, field):
        target = _text(value, prompt.place, field)
        if targets.setdefault(prompt.instruction, target) != target:
            raise InputError(f"{prompt.place}: an earlier row has another {field} for this prompt; keep one")
    return targets


def _stated(path: Path, field: str) -> list[tuple[Prompt, Any]]:
    """Each row's prompt, and what stands under `field`."""
    if field == CHOSEN:
        pairs = read_preferences(path, on_bad_row="error").pairs
        return [(prompt_of(pair), contents(pair.chosen)[0]) for pair in pairs]
    prompts, rows = read_prompts(path), [row for _, row in read_rows(path)]
    if len(prompts.rows) != len(rows):
        raise InputError(f"{path}: {prompts.repeated} rows repeat a prompt; keep one row of each, with its {field}")
    return [(prompt, row.get(field)) for prompt, row in zip(prompts.rows, rows, strict=True)]


def _text(value: Any, place: str, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    stated = "missing" if value is None else repr(value)
    raise InputError(f"{place}: {field} is {stated}; a target is a text or number, under the key that --field names")


def _instruction(read: Answers, row: AnswerRow) -> str:
    if row.instruction is None:
        raise InputError(
            f"{read.file} has no texts of its prompts: rules judge answers in AlpacaEval's form; generate them into a"
            " file that ends in .json"
        )
    return row.instruction


def _notes(read: Answers) -> tuple[str, ...]:
    if read.provenance is None:
        return ("how the answers were made is not known: no provenance lies beside them",)
    cut = read.counts.get("length_limit", 0)
    return (f"{cut} of {len(read.rows)} answers were cut at the limit of new tokens",) if cut else ()
