"""YAML 1.2 scalars, and what the loader refuses."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafocal.errors import InputError
from lorafocal.yaml12 import dump_yaml, parse_yaml


@pytest.mark.row("F18")
@pytest.mark.parametrize(("text", "value"), [("5e-6", 5e-6), ("1e-4", 1e-4), ("1e3", 1e3), ("-.5", -0.5), ("2.", 2.0)])
def test_floats_without_a_point_are_numbers(text: str, value: float) -> None:
    found = parse_yaml(text, source="test")
    assert isinstance(found, float)
    assert found == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-3", -3), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"), ("1e", "1e"), ("'5e-6'", "5e-6"),
        (".inf", math.inf), ("-.Inf", -math.inf),
    ],
)  # fmt: skip
def test_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, source="test")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice, first in line 1"),
        ("a: {b: 1, b: 2}", "line 1: the key 'b' is given twice"),
        ("a: &x [1]\nb: *x", "line 2: an alias"),
        ("1: a", "the key 1 is not a word"),
        ("? [a]\n: b", "is not a word"),
        ("a: [1", "line"),
        ("a: 1\n---\na: 2", "single document"),
    ],
)
def test_refused_yaml_names_the_line(text: str, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        parse_yaml(text, source="run.yaml")
    assert str(error.value).startswith("run.yaml")
    assert complaint in str(error.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!include x.yaml"])
def test_tags_that_build_objects_are_refused(tag: str) -> None:
    with pytest.raises(InputError, match="could not determine a constructor"):
        parse_yaml(f"a: {tag}", source="run.yaml")


@pytest.mark.parametrize("inside", ["[", "{a: "])
def test_yaml_too_deep_to_be_read_is_refused(inside: str) -> None:
    with pytest.raises(InputError, match=r"^run\.yaml: .* too deep to be read"):
        parse_yaml(inside * 5000, source="run.yaml")


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=8)


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS
        | st.sampled_from(["1e3", "5e-6", "no", "yes", "010", "1:30", "null", "~", ""]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
        max_leaves=8,
    )
)  # fmt: skip
def test_what_is_written_is_read_back(values: Any) -> None:
    found = parse_yaml(dump_yaml(values), source="test")
    assert found == values
    assert repr(found) == repr(values)


def test_words_that_yaml_1_1_would_misread_are_quoted() -> None:
    words = {"a": "no", "b": "1e3", "c": "1:30"}
    assert yaml.safe_load(dump_yaml(words)) == words
