"""What an HTTP error of a server means, in words that hold neither the question nor the key.

Servers write into their errors what they like, the prompt and parts of the key among it, so what they say is quoted
only where it shares nothing with either.
"""

from __future__ import annotations

import re
from typing import Any

from lorafocal.endpoints.endpoint import OPENAI_KEY, Endpoint, Question
from lorafocal.errors import InputError

LONGEST_QUOTE = 200  # characters
SHARED_WITH_QUESTION, SHARED_WITH_KEY = 16, 6  # characters in a row that a quote may not have in common with them
_WORD = re.compile(r"[A-Za-z][A-Za-z_]{2,39}")  # context_length_exceeded, and nothing like a key
_ENDS = "The replies so far are kept, and the same command goes on"


class Unanswered(Exception):
    """A question without a reply; `down`: the server was at fault, not the question."""

    def __init__(self, reason: str, *, down: bool) -> None:
        super().__init__(reason)
        self.reason, self.down = reason, down


def refusal(endpoint: Endpoint, question: Question, error: Any) -> Exception:
    """What to raise for an `openai.APIStatusError`: InputError where every question would meet it, else Unanswered."""
    status, model = error.status_code, endpoint.model
    named = next((word for word in (error.code, error.type) if isinstance(word, str) and _WORD.fullmatch(word)), None)
    word = f"HTTP {status}" + (f", {named}" if named else "")
    if status == 401:
        return InputError(f"the server of {model} wants a key it knows ({word}): {_about_key(endpoint)}. {_ENDS}")
    if status == 403:
        return InputError(f"the server does not let this key use {model} ({word}): {_about_key(endpoint)}. {_ENDS}")
    if status == 404:
        return InputError(
            f"the server has no model {model}, or no chat completions at this URL, which ends in /v1 as a rule"
            f" ({word}). {_ENDS}"
        )
    if status == 402 or named == "insufficient_quota":
        return InputError(f"the account behind the key has no credit left for {model} ({word}). {_ENDS}")
    said = quotable(_message(error.body), question, endpoint.credential())
    return Unanswered(f"{word}: {said}" if said else word, down=status in (408, 409, 429) or status >= 500)


def quotable(message: str, question: Question, key: str | None) -> str | None:
    """`message` on one line where it repeats neither the question nor the key, nor could hide them; else None."""
    line = " ".join(message.split())
    if not line or len(line) > LONGEST_QUOTE or not line.isascii() or not line.isprintable() or "\\" in line:
        return None
    texts = [" ".join(str(said.get("content", "")).split()) for said in question.messages]
    if (key and _share(line, key, SHARED_WITH_KEY)) or any(_share(line, text, SHARED_WITH_QUESTION) for text in texts):
        return None
    return line


def _share(line: str, text: str, length: int) -> bool:
    """Whether `line` holds all of `text`, or `length` of its characters in a row."""
    length = min(length, len(text))
    return length > 0 and any(line[start : start + length] in text for start in range(len(line) - length + 1))


def _message(body: Any) -> str:
    """The words in an error's body; the package unwraps OpenAI's own form."""
    said = body.get("message") if isinstance(body, dict) else None
    return said if isinstance(said, str) else ""


def _about_key(endpoint: Endpoint) -> str:
    if endpoint.key_variable or endpoint.url is None:
        return f"look at the variable {endpoint.key_variable or OPENAI_KEY}"
    return "none was sent; name the variable that holds it with --key-variable"
