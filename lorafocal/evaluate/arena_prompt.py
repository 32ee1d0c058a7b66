"""What Arena-Hard's judge is told: that project's own words from the user's copy of its configuration, or ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from lorafocal.errors import InputError, unreadable
from lorafocal.publish import text_sha256
from lorafocal.yaml12 import parse_yaml

LABEL_PATTERN = r"\[\[([AB<>=]+)\]\]"
ATTEMPTS = 2
OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 4096}  # arena-hard-auto v0.1, config/judge_config.yaml

SYSTEM = """\
You compare two answers to one user, from assistants A and B. Who they are is unknown to you, and the order in which \
you read them means nothing.

First write the answer that you would give yourself. Then hold both against it and against what you know: name each \
error of fact, of reasoning or of code, and each part of the request that is left out.

Prefer the answer that serves the user better: right, complete, to the point, and no longer than that takes. Where the \
request can be read in several ways, a question back may be worth more than a guess. Length, layout and a sure tone \
earn nothing by themselves.

Close with exactly one of these labels, on a line of its own:
[[A>>B]] A is much better
[[A>B]] A is a little better
[[A=B]] both are about equally good
[[B>A]] B is a little better
[[B>>A]] B is much better"""
TEMPLATE = """\
=== The user's request ===
{question_1}

=== Answer of assistant A ===
{answer_1}

=== Answer of assistant B ===
{answer_2}

=== End of the answers ==="""

_REQUIRED = ("system_prompt", "prompt_template", "regex_pattern")
_OPTIONAL = ("temperature", "max_tokens", "number_of_judgment_attempts")
_FIXED = {"pairwise": True, "baseline": True, "reference": False}  # what makes it Arena-Hard v0.1
_NAMES = ("name", "bench_name", "judge_model", "baseline_model", "ref_model", "model_list")  # said by the call instead
_PLACE = re.compile(r"(question|answer)_[1-9][0-9]?")


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A judge's system message, the user messages to fill, its labels' pattern, and how it is asked.

    `attempts`: how often a judge is asked that gives no label. `options` go into the request. `file` is the
    configuration's name; None for the words above.
    """

    system: str = SYSTEM
    templates: tuple[str, ...] = (TEMPLATE,)
    pattern: str = LABEL_PATTERN
    attempts: int = ATTEMPTS
    options: Mapping[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    file: str | None = None

    def __post_init__(self) -> None:
        where = self.file or "the judge's prompt"
        if _groups(self.pattern, where) != 1:
            raise InputError(f"{where}: regex_pattern has one group, the label; {self.pattern!r} has not")
        if self.attempts < 1:
            raise InputError(f"{where}: number_of_judgment_attempts is 1 or more, not {self.attempts}")
        for template in self.templates:
            _check_template(template, where)

    @property
    def sha256(self) -> str:
        """Of everything that a verdict depends on."""
        told = {key: value for key, value in asdict(self).items() if key != "file"}
        return text_sha256(json.dumps(told, sort_keys=True))

    def messages(
        self, question: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> tuple[dict[str, str], ...]:
        """The chat that asks for a verdict: `first` (assistant A) and `second` (B) are the answers, turn by turn.

        Raises InputError where the templates leave out a turn, or name one that there is not.
        """
        values = {f"question_{number}": text for number, text in enumerate(question, start=1)}
        values |= {f"answer_{number}": text for number, text in enumerate((*first, *second), start=1)}
        named = {place for template in self.templates for place in _places(template)}
        if named != values.keys():
            raise InputError(
                f"{self.file or 'the judge prompt'} speaks of {', '.join(sorted(named))}, and a question has"
                f" {', '.join(sorted(values))}: give a --judge-config for as many turns"
            )
        users = [{"role": "user", "content": template.format(**values)} for template in self.templates]
        return ({"role": "system", "content": self.system}, *users)


def read_judge_prompt(path: Path) -> JudgePrompt:
    """Arena-Hard v0.1's `config/judge_config.yaml`, from the user's copy. Raises InputError naming file and key.

    What names models and files there is said by the call instead. A `temperature` or `max_tokens` of null is left out
    of the request, as some judges take none.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), source=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    if not isinstance(values, Mapping):
        raise InputError(f"{path.name} is not a judge's configuration: it holds no keys")
    _check_keys(values, path.name)
    options = {key: values.get(key, default) for key, default in OPTIONS.items()}
    return JudgePrompt(
        system=values["system_prompt"],
        templates=tuple(values["prompt_template"]),
        pattern=values["regex_pattern"],
        attempts=values.get("number_of_judgment_attempts", ATTEMPTS),
        options={key: value for key, value in options.items() if value is not None},
        file=path.name,
    )


def _check_keys(values: Mapping[str, Any], file: str) -> None:
    if missing := [key for key in _REQUIRED if not values.get(key)]:
        raise InputError(f"{file} lacks {', '.join(missing)}: give Arena-Hard v0.1's config/judge_config.yaml")
    if unknown := sorted(values.keys() - {*_REQUIRED, *_OPTIONAL, *_FIXED, *_NAMES}):
        raise InputError(f"{file}: {', '.join(unknown)} is no key of Arena-Hard v0.1's configuration; remove it")
    for key, value in _FIXED.items():
        if values.get(key, value) is not value:
            raise InputError(f"{file}: {key} is {str(value).lower()} in Arena-Hard v0.1, not {values[key]!r}")
    templates = values["prompt_template"]
    if not isinstance(templates, list) or not all(isinstance(text, str) for text in templates):
        raise InputError(f"{file}: prompt_template is a list of texts")
    kinds: dict[str, tuple[type, ...]] = {
        "system_prompt": (str,),
        "regex_pattern": (str,),
        "number_of_judgment_attempts": (int,),
        "temperature": (int, float, type(None)),
        "max_tokens": (int, type(None)),
    }
    for key, allowed in kinds.items():
        if key in values and (isinstance(values[key], bool) or not isinstance(values[key], allowed)):
            raise InputError(f"{file}: {key} is {values[key]!r}, which Arena-Hard's configuration never has there")


def _groups(pattern: str, where: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise InputError(f"{where}: regex_pattern {pattern!r} is no regular expression ({error})") from error


def _places(template: str) -> list[str]:
    return [place for _, place, _, _ in Formatter().parse(template) if place is not None]


def _check_template(template: str, where: str) -> None:
    """Only plain places such as {question_1}: str.format can do more, and none of it belongs here."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{where}: prompt_template cannot be filled ({error})") from error
    for _, place, spec, conversion in parts:
        if place is not None and (spec or conversion or not _PLACE.fullmatch(place)):
            raise InputError(f"{where}: prompt_template has places {{question_1}}, {{answer_1}}..., not {{{place}}}")
