"""Who is asked, and what: an endpoint, a question, and the name under which its reply is kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lorafocal.errors import InputError

OPENAI_URL, OPENAI_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
OPENAI_ELSEWHERE = "OPENAI_BASE_URL"  # by which the package sends questions and key to another server
OPENAI_HEADERS = "OPENAI_CUSTOM_HEADERS"  # which the package adds to every request, whoever it goes to
_OWN = ("model", "messages", "stream", "n")  # of a request: said by the endpoint and the question, or always one


@dataclass(frozen=True, slots=True)
class Question:
    """Chat messages ({"role", "content"} each) and the request's further fields, as the protocol names them.

    `options` go into the request as they are: `max_tokens`, `temperature`, `top_p`, `seed`, `stop`, `logprobs`,
    `top_logprobs`, and what a server understands beyond the protocol (vLLM's `top_k`).
    """

    messages: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if claimed := [name for name in _OWN if name in self.options]:
            raise InputError(f"a question's options cannot hold {', '.join(claimed)}: the endpoint says them")

    @property
    def characters(self) -> int:
        """Of all that is sent to be read."""
        return sum(len(str(message.get("content", ""))) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind a URL (None: OpenAI's own), and how hard it may be asked.

    `key_variable`: the environment variable that holds the key. Where none is named, OPENAI_API_KEY is read for
    OpenAI's own address, and another server gets no key at all: a key goes only where its owner sends it.
    `timeout_s`: seconds an attempt may be silent; `attempts`: requests a question, the first included, with growing
    pauses or those that the server asks for; `requests_per_minute`: of all of them together, attempts included.
    """

    model: str
    url: str | None = None
    key_variable: str | None = None
    concurrency: int = 8
    timeout_s: float = 120.0
    attempts: int = 6
    requests_per_minute: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("the name of the model to ask is empty")
        if self.url is not None:
            _check_url(self.url)
            if os.environ.get(OPENAI_HEADERS):
                raise InputError(
                    f"{OPENAI_HEADERS} is set, and would be sent to this server, keys in it too: unset it here, and"
                    " name the variable with this server's key by --key-variable"
                )
        elif (os.environ.get(OPENAI_ELSEWHERE) or OPENAI_URL).rstrip("/") != OPENAI_URL:
            raise InputError(
                f"{OPENAI_ELSEWHERE} is set, and no --server: it is not followed, for a key goes only where a command"
                f" says. Name that server by --server URL (with --key-variable {OPENAI_KEY} where it is to have that"
                f" key), or unset {OPENAI_ELSEWHERE} to ask OpenAI's own"
            )
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is 1 or more, not {getattr(self, name)}")
        for name in ("timeout_s", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is above 0, not {value}")

    def key(self, question: Question) -> str:
        """The name of a question put to this model: sha256 of model, messages and options, wherever it is asked."""
        asked = [self.model, [dict(message) for message in question.messages], dict(question.options)]
        text = json.dumps(asked, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        try:
            return hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise InputError(
                "a question holds half a surrogate pair, which no server can be sent: mend the text"
            ) from error

    def credential(self) -> str | None:
        """The key from the environment. Raises InputError, before anything is sent, where one is needed and missing."""
        name = self.key_variable or (OPENAI_KEY if self.url is None else None)
        if name is None:
            return None
        value = os.environ.get(name, "").strip()
        if value and not (value.isascii() and value.isprintable() and " " not in value):
            raise InputError(f"{name} holds characters that no key has: set it again")
        if value:
            return value
        raise InputError(
            f"{name} holds no key for {self.model}: set it in the environment (a key is never given on the command"
            " line), or name your own server with --server"
        )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
        parts = urlsplit("")
    if not whole:
        raise InputError("the server's URL is not one; it reads like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "the server's URL holds a user name, a password or a query: give the address alone, and the key in an"
            " environment variable that --key-variable names"
        )
