"""One question to one server, through the `openai` package: its retries, its backoff, its Retry-After."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lorafocal.endpoints.endpoint import OPENAI_URL, Endpoint, Question
from lorafocal.endpoints.refusals import Unanswered, refusal
from lorafocal.endpoints.reply import MalformedReply, Reply, parse_body
from lorafocal.errors import InputError

READINGS = 3  # of a question whose replies are no chat completions; each with all its attempts
NO_KEY = "none"  # the package insists on one
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


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
        self._openai = library()
        self._endpoint = endpoint
        pace = Pace(endpoint.requests_per_minute)
        self._client = self._openai.OpenAI(
            api_key=endpoint.credential() or NO_KEY,
            base_url=endpoint.url or OPENAI_URL,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.attempts - 1,
            http_client=self._openai.DefaultHttpxClient(event_hooks={"request": [pace.wait]}),
        )
        if endpoint.url is not None:  # nobody else's business, and the package reads them from the environment
            self._client.organization = self._client.project = None

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
            raise refusal(self._endpoint, question, error) from None
        return bytes(raw.http_response.content)


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


def library() -> ModuleType:
    """The `openai` package. Raises InputError where it is not installed."""
    try:
        import openai
    except ImportError as error:
        raise InputError("asking a server needs the openai package: pip install 'lorafocal[eval]'") from error
    return openai
