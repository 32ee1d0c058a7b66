"""What came back: one reply, read from the protocol's JSON and kept as a line of a journal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


class MalformedReply(ValueError):
    """A body that is no chat completion. The message says what it lacks and never quotes it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The first choice of a chat completion.

    `text` is empty where the model said nothing; `finish_reason` is the protocol's word ("stop", "length",
    "content_filter"...); token counts are the server's, None where it gives none; `model` is the name that the
    server answers under. `top_logprobs`: a mapping from token to log-prob (nats) for each token of the text.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str
    top_logprobs: tuple[Mapping[str, float], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_body(body: bytes) -> Reply:
    """A chat completion as a server wrote it; halves of surrogate pairs become question marks.

    Raises MalformedReply for anything else, empty `choices` and log-probs that are no numbers included.
    """
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedReply("the body is no JSON") from error
    try:
        choice = record["choices"][0]
        text, usage = choice["message"].get("content"), record.get("usage") or {}
        reply = Reply(
            "" if text is None else text.encode(errors="replace").decode(),
            choice.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            record.get("model") or "",
            _top_logprobs(choice.get("logprobs")),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MalformedReply("the body is JSON but no chat completion with a choice") from error
    return _checked(reply)


def from_dict(record: Mapping[str, Any]) -> Reply:
    """A reply that `as_dict` wrote. Raises MalformedReply."""
    try:
        fields = {name: record[name] for name in Reply.__slots__}
        if fields["top_logprobs"] is not None:
            fields["top_logprobs"] = tuple(dict(token) for token in fields["top_logprobs"])
    except (LookupError, TypeError, ValueError) as error:
        raise MalformedReply("a field of a reply is missing") from error
    return _checked(Reply(**fields))


def _top_logprobs(logprobs: Any) -> tuple[Mapping[str, float], ...] | None:
    if not logprobs or logprobs.get("content") is None:
        return None
    return tuple(
        {entry["token"]: float(entry["logprob"]) for entry in token.get("top_logprobs") or [token]}
        for token in logprobs["content"]
    )


def _checked(reply: Reply) -> Reply:
    counts = (reply.prompt_tokens, reply.completion_tokens)
    if not (
        isinstance(reply.text, str)
        and isinstance(reply.finish_reason, str | None)
        and isinstance(reply.model, str)
        and not any(math.isnan(value) for token in reply.top_logprobs or () for value in token.values())
        and all(count is None or (type(count) is int and count >= 0) for count in counts)
    ):
        raise MalformedReply("a field of the chat completion has the wrong type")
    return reply
