"""Rules by example: what each calls right, and what none of them guesses."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafocal.errors import InputError
from lorafocal.evaluate.rules import last_number, rule_named

NUMBERS = {
    "it is 42.": "42",
    "1,234.50 in all": "1234.5",
    "1,234,567.89km": "1234567.89",
    "from 3-5": "5",  # a range, no minus
    "x = -5": "-5",
    "x = \u22125": "-5",
    "$1,000": "1000",
    "1,2,3": "3",
    "12,34": "34",
    "about .5": "0.5",
    r"\boxed{42}": "42",
    "1e3": "1000",
    "#### 72": "72",
    "7 (of 9)": "9",
    "1/2": "2",  # a fraction is two numbers
    "version A4": None,
    "v1.5 of x2 and x_2": None,
    "GPT-4": "4",
    "_42_": "42",
    "**42**": "42",
    "__-5__": "-5",
    "答案是42": "42",  # "the answer is" in Chinese, which writes no spaces
    "答案是-5": "-5",
    "合计1,234.50元": "1234.5",
    "第3-5页": "5",
    "답은 .5": "0.5",
    "ответ42": "42",  # "answer" in Russian
    "Ту-154": "154",  # a Tu-154, no minus
    "№42": "42",
    "none": None,
    "": None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_every_number_is_read_as_it_is_written(number: Decimal) -> None:
    for text in (f"so {number:f}", f"so {number:,f} dollars.", f"1 2 {number:f}\n"):
        assert last_number(text) == number


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    found = last_number(text)
    assert found is None or found.is_finite()


@pytest.mark.parametrize(
    ("rule", "answer", "target", "right"),
    [
        ("exact", " 1 3\n4 ", "1 3 4", True),
        ("exact", "1 34", "1 3 4", False),
        ("exact", "1 3 4.", "1 3 4", False),
        ("contains", "The answer is Paris.", " Paris", True),
        ("contains", "paris", "Paris", False),
        ("number", "so it is $1,234.50", "#### 1234.5", True),
        ("number", "42 or 43", "42", False),
        ("number", "no idea", "0", False),
        ("regex", "yes, 12 of them", r"\b\d\d\b", True),
        ("regex", "yes", "^no", False),
    ],
)
def test_an_answer_against_its_target(rule: str, answer: str, target: str, right: bool) -> None:
    named = rule_named(rule)
    assert named.needs_target
    assert named.holds(answer, target) is right


@pytest.mark.parametrize(
    ("answer", "keys", "right"),
    [
        ('{"name": "x", "age": 3}', (), True),
        ('{"name": "x", "age": 3}', ("name", "age"), True),
        ('{"name": "x"}', ("name", "age"), False),
        ('[{"name": "x"}]', ("name",), False),
        ('```json\n{"name": 1}\n```', ("name",), True),
        ('Here it is:\n```json\n{"name": 1}\n```', (), False),
        ('{"name": NaN}', (), False),
        ("{'name': 1}", (), False),
        ("", (), False),
        ("[" * 100_000, (), False),
    ],
)
def test_json(answer: str, keys: tuple[str, ...], right: bool) -> None:
    rule = rule_named("json", keys=keys)
    assert not rule.needs_target
    assert rule.holds(answer, "") is right


def test_a_pattern_of_its_own_needs_no_target() -> None:
    rule = rule_named("regex", pattern="^y(es)?$")
    assert not rule.needs_target
    assert [rule.holds(answer, "") for answer in ("yes", "y", "no")] == [True, True, False]


def test_what_no_rule_reads_is_refused() -> None:
    with pytest.raises(InputError, match="rule is one of exact, contains, number, regex, json"):
        rule_named("vibes")
    with pytest.raises(InputError, match="no regular expression"):
        rule_named("regex", pattern="(")
    with pytest.raises(InputError, match="pattern belongs to the rule regex"):
        rule_named("exact", pattern="x")
    with pytest.raises(InputError, match="keys belong to the rule json"):
        rule_named("number", keys=["x"])
    for rule, target, message in (
        ("contains", " ", "stands in every answer"),
        ("number", "many", "holds no number"),
        ("regex", "(", "no regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            rule_named(rule).holds("1", target)
