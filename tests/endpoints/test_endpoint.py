"""Endpoints and questions that cannot be are refused; a question's name depends on all of it and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from lorafocal.endpoints import Endpoint, Question
from lorafocal.errors import InputError

ONE = Question(({"role": "user", "content": "a"},), {"seed": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "the name of the model"),
        ({"url": "localhost:8000/v1"}, "reads like http://localhost:8000/v1"),
        ({"url": "ftp://localhost/v1"}, "reads like http"),
        ({"url": "http://"}, "reads like http"),
        ({"url": "http://[::1/v1"}, "reads like http"),
        ({"url": "http://localhost:99999/v1"}, "reads like http"),
        ({"url": "http://me:secret@localhost/v1"}, "a user name, a password or a query"),
        ({"url": "http://localhost/v1?key=secret"}, "a user name, a password or a query"),
        ({"concurrency": 0}, "concurrency is 1 or more, not 0"),
        ({"attempts": 0}, "attempts is 1 or more, not 0"),
        ({"timeout_s": 0.0}, "timeout_s is above 0"),
        ({"timeout_s": float("nan")}, "timeout_s is above 0"),
        ({"requests_per_minute": -1.0}, "requests_per_minute is above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        Endpoint(**{"model": "judge"} | settings)
    assert words in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["model", "messages", "stream", "n"])
def test_a_question_does_not_say_what_the_endpoint_says(name: str) -> None:
    with pytest.raises(InputError, match=name):
        Question(ONE.messages, {name: 1})


def test_a_key_depends_on_model_messages_and_options() -> None:
    other_text = Question(({"role": "user", "content": "b"},), {"seed": 1})
    other_role = Question(({"role": "system", "content": "a"},), {"seed": 1})
    other_option = Question(ONE.messages, {"seed": 2})
    none = Question(ONE.messages)
    keys = {Endpoint("judge").key(each) for each in (ONE, other_text, other_role, other_option, none)}
    assert len(keys | {Endpoint("other").key(ONE)}) == 6


def test_a_key_is_the_same_wherever_and_however_hard_one_asks() -> None:
    assert Endpoint("judge").key(ONE) == Endpoint("judge", "http://localhost:1/v1", "KEY", 1, 2.0, 3, 4.0).key(ONE)
    turned = Question(({"content": "a", "role": "user"},), {"seed": 1})
    assert Endpoint("judge").key(turned) == Endpoint("judge").key(ONE)


def test_half_a_surrogate_pair_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InputError, match="half a surrogate pair"):
        Endpoint("judge").key(Question(({"role": "user", "content": "\ud83d"},)))
