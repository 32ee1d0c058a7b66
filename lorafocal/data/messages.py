"""What may stand in a row: texts and conversations, checked piece by piece and named where they are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafocal.data.places import Place, RowFault

Messages = list[dict[str, str]]

ROLES = {role: role for role in ("system", "developer", "user", "assistant")}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TOOL_ROLES = {"tool", "function", "ipython", "observation", "function_call", "tool_call", "tool_response"}
TOOL_KEYS = {"tool_calls", "tool_call_id", "tool_responses", "function_call"}
Spelling = tuple[str, str, dict[str, str]]  # key of the role, key of the text, what roles mean
SPELLINGS: tuple[Spelling, ...] = (("role", "content", ROLES), ("from", "value", SHAREGPT_ROLES))

MAX_TEXT = 16 * 2**20  # characters: no model reads that much, and tokenising it would stall the run


def contents(side: str | Messages) -> list[str]:
    """The texts of one side of a row."""
    return [side] if isinstance(side, str) else [message["content"] for message in side]


def as_text(side: str | Messages, between: str = "\n\n") -> str:
    """One side of a row for a reader: a message alone as its text, several each with its role, and `between` them."""
    if isinstance(side, str) or len(side) == 1:
        return contents(side)[0]
    return between.join(f"{message['role']}: {message['content']}" for message in side)


def said_in(side: str | Messages) -> list[str]:
    """What a completion says: of several messages the assistant's."""
    if isinstance(side, str):
        return [side]
    return [message["content"] for message in side if message["role"] == "assistant" or len(side) == 1]


def read_text(text: Any, place: Place) -> str:
    """A string that UTF-8 can spell: a JSON escape may give half a surrogate pair, which no tokenizer reads."""
    if not isinstance(text, str):
        raise place.fault("wrong_type", f"expected a string, found {kind(text)}; give it a text")
    if len(text) > MAX_TEXT:
        raise place.fault("too_long", f"{len(text):,} characters; shorten the text to {MAX_TEXT:,} or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"character {error.start + 1} is half of a surrogate pair; repair the text"
        raise place.fault("not_utf8", message) from error
    return text


def read_messages(messages: Any, place: Place) -> Messages:
    """Messages spelled `{"role", "content"}` or, as in ShareGPT, `{"from", "value"}`; one alone counts as a list."""
    if isinstance(messages, Mapping):
        return [read_message(messages, place)]
    if not isinstance(messages, list):
        raise place.fault("wrong_type", f"expected a list of messages, found {kind(messages)}; write it as messages")
    if not messages:
        raise place.fault("empty_conversation", "an empty list; give at least one message")
    return [read_message(message, place.at(f"[{position}]")) for position, message in enumerate(messages)]


def read_message(message: Any, place: Place) -> dict[str, str]:
    """One message with a known role and text; what else it holds would be lost and is refused."""
    if not isinstance(message, Mapping):
        raise no_message(kind(message), place)
    spelling = next((spelling for spelling in SPELLINGS if is_spelled(message, spelling)), None)
    if spelling is None:
        refuse_extra(message, SPELLINGS[0][:2], place)
        raise no_message(f"the keys {', '.join(str(key)[:40] for key in message) or '(none)'}", place)
    role_key, text_key, roles = spelling
    if len(message) > 2:
        refuse_extra(message, (role_key, text_key), place)
    role = message[role_key]
    if not isinstance(role, str) or role not in roles:
        if isinstance(role, str) and role in TOOL_ROLES:
            raise tools_fault(place.at(f".{role_key}"))
        says = f"{str(role)[:40]!r} is no known role; use one of {', '.join(roles)}"
        raise place.at(f".{role_key}").fault("unknown_role", says)
    return {"role": roles[role], "content": read_text(message[text_key], place.at(f".{text_key}"))}


def is_spelled(message: Mapping[str, Any], spelling: Spelling) -> bool:
    return message.get(spelling[0]) is not None and spelling[1] in message


def no_message(found: str, place: Place) -> RowFault:
    return place.fault("no_message", f'a message is {{"role": ..., "content": ...}}, found {found}; write it so')


def refuse_extra(message: Mapping[str, Any], keys: tuple[str, ...], place: Place) -> None:
    """Tool calls, and whatever else stands beside role and text."""
    if tools := sorted(key for key in TOOL_KEYS if message.get(key)):
        raise tools_fault(place.at(f".{tools[0]}"))
    extra = sorted(str(key) for key, value in message.items() if value is not None and key not in {*keys, *TOOL_KEYS})
    if extra and {*keys} <= {*message}:
        says = f"messages with {', '.join(extra)} are not read; keep only {' and '.join(keys)}"
        raise place.fault("unknown_message_keys", says)


def tools_fault(place: Place) -> RowFault:
    return place.fault(
        "tools", "tool calls are not supported: the template would need the tools as well; remove these rows"
    )


def check_prompt(messages: Messages, place: Place) -> Messages:
    """A conversation that waits for the assistant."""
    if messages[-1]["role"] == "assistant":
        raise place.fault(
            "answered_prompt",
            "the last message is the assistant's; a prompt ends before the answer that was judged: move it there",
        )
    if not messages[-1]["content"]:
        raise place.at(f"[{len(messages) - 1}].content").fault("empty_prompt", "empty; a prompt needs text")
    return messages


def check_answer(messages: Messages, place: Place) -> Messages:
    """Exactly one assistant message, with text."""
    if len(messages) > 1:
        raise place.fault(
            "long_answer",
            f"{len(messages)} messages; an answer is one assistant message here: move the earlier ones, which both "
            "answers share, into prompt; where several turns were judged together, give them behind a prompt in form: "
            "explicit, or whole in form: whole_conversations",
        )
    if messages[0]["role"] != "assistant":
        raise place.fault(
            "not_an_answer", f"its role is {messages[0]['role']}; the judged message is the assistant's: correct it"
        )
    if not messages[0]["content"]:
        raise place.fault("empty_completion", "empty; remove the row or give the answer a text")
    return messages


def check_turns(messages: Messages, place: Place, start: int = 0) -> Messages:
    """The completion from message `start` on, one turn or several: the assistant begins, ends, and speaks in turn."""
    if len(messages) - start == 1:
        return check_answer(messages[start:], place)
    for position in (start, len(messages) - 1):
        if (role := messages[position]["role"]) != "assistant":
            raise place.at(f"[{position}]").fault(
                "not_an_answer",
                f"its role is {role}; what was judged begins and ends with a message of the assistant's: move what "
                "comes before into prompt, and leave out what comes behind",
            )
    for position, message in enumerate(messages[start:], start):
        if message["role"] != "assistant":
            continue
        if position > start and messages[position - 1]["role"] == "assistant":
            raise place.at(f"[{position}]").fault(
                "no_turn", "two messages of the assistant's in a row; join them, or put in what was said between"
            )
        if not message["content"]:
            raise place.at(f"[{position}].content").fault(
                "empty_completion", "empty; remove the row or give the turn a text"
            )
    return messages[start:]


def kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    if value is None:
        return "null"
    return KINDS.get(type(value)) or ("an object" if isinstance(value, Mapping) else type(value).__name__)


KINDS = {str: "a string", list: "a list", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
