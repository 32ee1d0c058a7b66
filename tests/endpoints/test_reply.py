"""What counts as a reply: a chat completion with a choice, and nothing that only looks like one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafocal.endpoints.reply import MalformedReply, Reply, from_dict, parse_body

WHOLE: dict[str, Any] = {
    "model": "judge-2026",
    "choices": [{"message": {"role": "assistant", "content": "m"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 1},
}


def body(**changes: Any) -> bytes:
    return json.dumps(WHOLE | changes).encode()


def choice(**changes: Any) -> bytes:
    return body(choices=[WHOLE["choices"][0] | changes])


def test_the_fields_of_a_whole_one() -> None:
    assert parse_body(body()) == Reply("m", "stop", 7, 1, "judge-2026")


def test_what_servers_leave_out_is_none() -> None:
    assert parse_body(b'{"choices": [{"message": {}}]}') == Reply("", None, None, None, "")
    assert parse_body(choice(logprobs={"content": None})).top_logprobs is None


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        body(choices=[]),
        body(choices=None),
        body(choices=[None]),
        choice(message=None),
        choice(message={"content": 3}),
        choice(message={"content": ["m"]}),
        choice(finish_reason=1),
        body(usage={"prompt_tokens": "7"}),
        body(usage={"prompt_tokens": -1}),
        body(usage={"prompt_tokens": True}),
        body(usage=[1]),
        body(model=3),
        choice(logprobs=[1]),
        choice(logprobs={"content": [{"token": "m"}]}),
        choice(logprobs={"content": [{"top_logprobs": [{"token": "m", "logprob": None}]}]}),
        choice(logprobs={"content": [{"top_logprobs": [{"token": "m", "logprob": float("nan")}]}]}),
        choice(logprobs={"content": [{"top_logprobs": [{"token": ["m"], "logprob": 0}]}]}),
    ],
    ids=lambda body: repr(body[:200]),
)
def test_anything_else_is_malformed_and_never_quoted(wrong: bytes) -> None:
    with pytest.raises(MalformedReply) as error:
        parse_body(wrong)
    assert "judge-2026" not in str(error.value)


def test_every_beginning_of_a_body_is_malformed() -> None:
    whole = choice(
        logprobs={"content": [{"token": "m", "logprob": -0.5, "top_logprobs": [{"token": "m", "logprob": 0}]}]}
    )
    for end in range(len(whole)):
        with pytest.raises(MalformedReply):
            parse_body(whole[:end])


counts = st.none() | st.integers(0, 2**40)
tokens = st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False, max_value=0), max_size=3)
top_logprobs = st.none() | st.lists(tokens, max_size=3).map(tuple)
replies = st.builds(Reply, st.text(), st.none() | st.text(), counts, counts, st.text(), top_logprobs)


@given(replies)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_journal_gives_back_what_it_got(reply: Reply) -> None:
    assert from_dict(json.loads(json.dumps(reply.as_dict()))) == reply


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    text = parse_body(rb'{"choices": [{"message": {"content": "a\ud83db \ud83d\ude00"}}]}').text
    assert text == "a?b \N{GRINNING FACE}"
