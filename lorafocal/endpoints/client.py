"""One question to one server, through the `openai` package: its retries, its backoff, its Retry-After.

What a server writes into an error may repeat the question or the key, so errors are told in our own words.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lorafocal.endpoints.endpoint import Endpoint, Question
from lorafocal.endpoints.reply import MalformedReply, Reply, parse_body
from lorafocal.errors import InputError

READINGS = 3  # of a question whose replies are no chat completions; each with all its attempts
NO_KEY = "none"  # the package insists on one
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
_CODE = re.compile(r"[A-Za-z][A-Za-z_]{2,39}")  # a word like context_length_exceeded, and nothing like a key


class Unanswered(Exception):
    """A question without a reply; `down`: the server was at fault, not the question."""

    def __init__(self, reason: str, *, down: bool) -> None:
        super().__init__(reason)
        self.reason, self.down = reason, down


class Pace:
    """Lets `per_minute` requests a minute through, evenly spaced, from any number of threads."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, request: Any = None) -> None:
        """Return when a request may go."""
        with self._lock:
            at = max(self._next, time.monotonic())
            self._next = at + self._interval
        time.sleep(max(0.0, at - time.monotonic()))


class Client:
    """A connection to an endpoint, used by several threads at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._openai = _openai()
        self._endpoint = endpoint
        pace = Pace(endpoint.requests_per_minute)
        self._client = self._openai.OpenAI(
            api_key=endpoint.credential() or NO_KEY,
            base_url=endpoint.url,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.attempts - 1,
            http_client=self._openai.DefaultHttpxClient(event_hooks={"request": [pace.wait]}),
        )

    def close(self) -> None:
        self._client.close()

    def reply(self, question: Question) -> Reply:
        """The reply. Raises Unanswered, and InputError for what every further question would meet too."""
        for _ in range(READINGS):
            body = self._body(question)
            try:
                return parse_body(body)
            except MalformedReply as error:
                why = str(error)
        raise Unanswered(f"malformed reply ({why})", down=False)

    def _body(self, question: Question) -> bytes:
        openai = self._openai
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._endpoint.model,
                messages=[dict(message) for message in question.messages],
                extra_body=dict(question.options),
            )
        except openai.APITimeoutError:
            raise Unanswered(f"no reply within {self._endpoint.timeout_s:g} s", down=True) from None
        except openai.APIConnectionError:
            raise Unanswered("the connection failed or broke", down=True) from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.code or error.type) from None
        return bytes(raw.http_response.content)

    def _refusal(self, status: int, code: str | None) -> Exception:
        """What an HTTP error means: for all questions (InputError), or for this one."""
        word = f"HTTP {status}" + (f", {code}" if code and _CODE.fullmatch(code) else "")
        model, ends = self._endpoint.model, "The replies so far are kept, and the same command goes on"
        if status == 401:
            return InputError(f"the server of {model} wants a key it knows ({word}): {self._key()}. {ends}")
        if status == 403:
            return InputError(f"the server of {model} does not let this key use it ({word}): {self._key()}. {ends}")
        if status == 404:
            return InputError(
                f"the server has no model {model}, or no chat completions at this URL, which ends in /v1 as a rule"
                f" ({word}). {ends}"
            )
        if code == "insufficient_quota":
            return InputError(f"the account behind the key has no credit left for {model} ({word}). {ends}")
        return Unanswered(word, down=status in (408, 409, 429) or status >= 500)

    def _key(self) -> str:
        endpoint = self._endpoint
        if endpoint.key_variable or endpoint.url is None:
            return f"look at the variable {endpoint.key_variable or 'OPENAI_API_KEY'}"
        return "none was sent; name the variable that holds it with --key-variable"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the client's libraries from logging requests, prompts and all, where somebody logs at level DEBUG."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _openai() -> ModuleType:
    try:
        import openai
    except ImportError as error:
        raise InputError("asking a server needs the openai package: pip install 'lorafocal[eval]'") from error
    return openai
