"""What a careless author would have written where judges are asked; more of `tests.careless`.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from typing import Any


def texts_alone(endpoint: Any, question: Any) -> str:
    """Row 58: another model's verdict, or one drawn otherwise, is taken from the journal as this one's."""
    return hashlib.sha256(json.dumps([dict(message) for message in question.messages]).encode()).hexdigest()


def whatever_there_is(original: Any) -> Any:
    """A reply without a choice is an empty verdict."""
    from lorafocal.endpoints.reply import MalformedReply, Reply

    def parse(body: bytes) -> Any:
        try:
            return original(body)
        except MalformedReply:
            return Reply("", "stop", None, None, "")

    return parse


def the_usual_key(endpoint: Any) -> str | None:
    """Row S8: as clients do, the key for OpenAI is sent to every server."""
    return os.environ.get(endpoint.key_variable or "OPENAI_API_KEY")


def talkative_libraries() -> Any:
    """Row S8: the client logs its requests for whoever listens."""
    return nullcontext()


def in_the_servers_words(message: str, question: Any, key: str | None) -> str:
    """Row S8: an error is printed as the server wrote it."""
    return message
