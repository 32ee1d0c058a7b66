"""Rules that decide alone, without a judge, whether an answer is right: against a target, a pattern, or as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from lorafocal.errors import InputError

# After a word a hyphen or a point is none of a number's, but for scripts without spaces between words: from Thai on.
_APART = r"(?<![^\W_\u0e00-\U0010ffff])"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.])(?<![A-Za-z0-9]_)"  # no part of a name or of another number
    rf"(?:{_APART}[-+\u2212])?"  # the minus of "3-5" is no sign
    rf"(?:(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|{_APART}\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_FENCED = re.compile(r"```[a-zA-Z0-9]*\n(.*)\n```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rule: whether an answer is right, given its target (the empty text where the rule needs none)."""

    name: str
    needs_target: bool
    holds: Callable[[str, str], bool]


def rule_named(name: str, *, pattern: str | None = None, keys: Sequence[str] = ()) -> Rule:
    """One of RULES.

    `exact`: the answer is the target, runs of blanks being one. `contains`: the target stands in the answer, as it is
    written. `number`: the last number of the answer equals the last number of the target. `regex`: `pattern` (else
    the target) is found in the answer, by Python's `re.search`. `json`: the answer, or the one fenced block that it
    is, is JSON; with `keys`, an object that has them all. Raises InputError for another name, a pattern that is none,
    and for options that the rule does not read.
    """
    if name not in RULES:
        raise InputError(f"rule is one of {', '.join(RULES)}, not {name!r}")
    if pattern is not None and name != "regex":
        raise InputError(f"a pattern belongs to the rule regex, not to {name}")
    if keys and name != "json":
        raise InputError(f"keys belong to the rule json, not to {name}")
    if name == "json":
        return Rule(name, False, lambda answer, _: is_json(answer, keys))
    if pattern is not None:
        compiled = _compiled(pattern)
        return Rule(name, False, lambda answer, _: compiled.search(answer) is not None)
    return Rule(name, True, _AGAINST_TARGET[name])


def is_exact(answer: str, target: str) -> bool:
    """Equal, where a run of blanks and line ends is one space and those at the ends do not count."""
    return answer.split() == target.split()


def contains(answer: str, target: str) -> bool:
    """Whether the target, without blanks at its ends, stands in the answer."""
    if not target.strip():
        raise InputError("an empty target stands in every answer; give it text")
    return target.strip() in answer


def same_number(answer: str, target: str) -> bool:
    """Whether the last numbers are equal in value: 1,234.50 is 1234.5. An answer without one is wrong."""
    right = last_number(target)
    if right is None:
        raise InputError(f"the target {target!r} holds no number")
    return last_number(answer) == right


def matches(answer: str, target: str) -> bool:
    """Whether the regular expression `target` is found in the answer."""
    return _compiled(target).search(answer) is not None


def is_json(answer: str, keys: Sequence[str] = ()) -> bool:
    """Whether an answer is one JSON value (as the standard has it: no NaN), and an object with these keys if any."""
    fenced = _FENCED.fullmatch(answer.strip())
    try:
        value = json.loads(fenced[1] if fenced else answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def last_number(text: str) -> Decimal | None:
    """The last number that a text writes: with a sign, commas between thousands, a point, an exponent.

    Digits (0 to 9) directly after a letter from a to z, as in A4 and x_2, are part of a name. After other letters they
    are not: many scripts write no spaces.
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from error


def _refuse(constant: Any) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_AGAINST_TARGET: dict[str, Callable[[str, str], bool]] = {
    "exact": is_exact,
    "contains": contains,
    "number": same_number,
    "regex": matches,
}
RULES = (*_AGAINST_TARGET, "json")
