"""The forms that preference rows have in the wild, each one function from a row to prompt, chosen and rejected.

A form is a function under `@form(name, *keys)`: the keys that make a row of this form, and what becomes of them. Its
`Row` checks what it hands out, so that a form says where things stand and nothing else:

    @form("alpaca", "instruction", "chosen", "rejected")
    def alpaca(row: Row) -> Sides:
        return row.text("instruction"), row.text("chosen"), row.text("rejected")

A row belongs to the form with the most keys of which all are there; among equals to the first whose `looks` agrees.
A null is a column that is known and empty: no form's key, but no leave to look for a prompt elsewhere either.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorafocal.data.messages import Messages, check_answer, check_prompt, check_turns, kind, read_messages, read_text
from lorafocal.data.places import Place, RowFault
from lorafocal.errors import InputError

Side = str | Messages
Sides = tuple[Side, Side, Side]  # prompt, chosen, rejected
Conversations = tuple[Messages, Messages, Messages]

# Messages that JSON or Python's repr has made one text: the keys of the forms below, of both kinds of quotes.
WRITTEN_MESSAGES = re.compile(
    r"""\s*\[\s*\{(?=.*?["'](role|from)["']\s*:)(?=.*?["'](content|value)["']\s*:).*\}\s*\]\s*""", re.DOTALL
)

EQUAL = "identical_completions", "chosen and rejected are equal; remove the row"  # a reason, and what is said

# Columns that hold a prompt under another name.
OTHER_NAMES_OF_A_PROMPT = ("instruction", "question", "query", "input", "context", "messages", "conversation", "turns")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: every value is checked when it is asked for, and named by its place where it is wrong."""

    values: Mapping[str, Any]
    place: Place

    def has(self, form: Form) -> bool:
        """Whether every key of a form is there."""
        return all(self.values.get(key) is not None for key in form.keys)

    def text(self, key: str) -> str:
        """A string that is not empty."""
        text = read_text(self.values.get(key), self.place.at(key))
        if not text:
            reason = "empty_prompt" if key == "prompt" else "empty_completion"
            raise self.place.at(key).fault(reason, "an empty string; remove the row or give it a text")
        return text

    def texts(self, *keys: str) -> list[str]:
        """Plain texts, and no conversation that something wrote as text; one answer alone may be such JSON."""
        texts = {key: self.text(key) for key in keys}
        written = [key for key, text in texts.items() if WRITTEN_MESSAGES.fullmatch(text)]
        if len(written) > 1 or {*written} - {"chosen", "rejected"}:
            raise self.place.at(written[0]).fault(
                "messages_as_text",
                "a list of messages that was written as text, as CSV files do, so its brackets would be trained; write"
                " the rows as .jsonl where they still are lists (`Dataset.to_json`), or read the text back (json.loads;"
                " ast.literal_eval where quotes are single, and only if commas stand between messages)",
            )
        return [*texts.values()]

    def messages(self, key: str) -> Messages:
        """A conversation of at least one message."""
        return read_messages(self.values.get(key), self.place.at(key))

    def prompt(self, key: str) -> Messages:
        """A conversation that waits for the assistant."""
        return check_prompt(self.messages(key), self.place.at(key))

    def answer(self, key: str) -> Messages:
        """One message of the assistant, in a list or by itself."""
        return check_answer(self.messages(key), self.place.at(key))

    def turns(self, key: str) -> Messages:
        """One turn of the assistant's or several, with what others say in between."""
        return check_turns(self.messages(key), self.place.at(key))

    def inside(self, key: str) -> Row:
        """An object inside the row."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.place.at(key).fault("wrong_type", f"expected an object, found {kind(value)}; write it as one")
        return Row(value, self.place.at(f"{key}."))

    def kinds(self, *keys: str) -> set[str]:
        """The types of values: `a string` or `a list`."""
        kinds = {key: kind(self.values.get(key)) for key in keys}
        for key, found in kinds.items():
            if found not in ("a string", "a list"):
                message = f"expected a string or a list of messages, found {found}; write it as one of these"
                raise self.place.at(key).fault("wrong_type", message)
        if len({*kinds.values()}) > 1:
            found = ", ".join(f"{key} is {what}" for key, what in kinds.items())
            message = f"strings and message lists are mixed ({found}); give all of them in the same form"
            raise self.place.fault("mixed_types", message)
        return {*kinds.values()}


@dataclass(frozen=True, slots=True)
class Form:
    """A form of row: its name, the keys that a row of it has, and how it is read."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Sides]
    looks: Callable[[Mapping[str, Any]], bool]


FORMS: dict[str, Form] = {}


def form(name: str, *keys: str, looks: Callable[[Mapping[str, Any]], bool] = lambda values: True) -> Callable:
    """Register the function below as a form; `looks` tells it from forms with the same keys."""

    def register(read: Callable[[Row], Sides]) -> Callable[[Row], Sides]:
        FORMS[name] = Form(name, keys, read, looks)
        return read

    return register


def form_named(name: str) -> Form:
    """The form that was stated. Raises InputError with the nearest names."""
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=1)
        hint = f"did you mean {near[0]}? Known" if near else "known"
        raise InputError(f"form: {name!r} is no form of rows; {hint}: {', '.join(FORMS)}")
    return FORMS[name]


def recognise(row: Row) -> Form:
    """The form of a row."""
    forms = by_size()
    found = next((form for form in forms if row.has(form) and form.looks(row.values)), None)
    if found is None:
        raise missing_key(row, min(forms, key=lambda form: len([*missing_keys(row, form)])))
    return found


def by_size() -> list[Form]:
    """Forms with more keys first."""
    return sorted(FORMS.values(), key=lambda form: -len(form.keys))


def read_sides(row: Row, form: Form) -> Sides:
    """Prompt, chosen and rejected of a row in a given form."""
    if not row.has(form):
        raise missing_key(row, form)
    return form.read(row)


def some_names(names: Iterable[object]) -> str:
    """The first of the names in order, each cut where it is long."""
    return ", ".join(name[:40] for name in sorted(map(str, names))[:20])


def missing_keys(row: Row, form: Form) -> Iterable[str]:
    return (key for key in form.keys if row.values.get(key) is None)


def missing_key(row: Row, form: Form) -> RowFault:
    """Which key a row lacks to be of a form."""
    there = [key for key, value in row.values.items() if value is not None]
    missing = next(iter(missing_keys(row, form)), "prompt")
    other = next((name for name in other_prompts(row.values) if row.values[name]), None)
    hint = f"a row needs {', '.join(form.keys[:-1])} and {form.keys[-1]}" if form.keys else "give it a key"
    if missing == "prompt" and other:
        hint = f"if it is `{other}`, say so with columns: {{prompt: {other}}}"
        hint += "; if it is what both answers begin with, with form: implicit"
    elif missing not in form.keys:
        hint = "its column is empty here: give it a text or remove the row"
    return row.place.at(missing).fault("missing_key", f"missing (the row has {some_names(there) or 'nothing'}); {hint}")


# ---- the forms


def repeats_its_prompt(values: Mapping[str, Any]) -> bool:
    sides = [values[key] for key in ("chosen", "rejected")]
    return all(isinstance(side, list) and len(side) > 1 for side in sides) and not all(
        map(goes_on, sides, [values] * 2)
    )


def goes_on(side: list[Any], values: Mapping[str, Any]) -> bool:
    """Whether messages begin with the assistant's and not with the given prompt's: several turns that follow it."""
    prompt, first = values["prompt"], side[0]
    speaker = (first.get("role") or first.get("from")) if isinstance(first, Mapping) else None
    return speaker in ("assistant", "gpt") and isinstance(prompt, list) and prompt[:1] != side[:1]


@form("ultrafeedback", "prompt", "chosen", "rejected", looks=repeats_its_prompt)
def ultrafeedback(row: Row) -> Sides:
    """UltraFeedback-binarized: a prompt, and whole conversations that repeat it."""
    sides = implicit_messages(row)
    check_repeated(row, sides[0])
    return sides


def check_repeated(row: Row, prompt: Messages) -> None:
    """The `prompt` of a row is what its conversations begin with."""
    given = row.values["prompt"]
    if isinstance(given, str):
        repeated = given.strip() in (message["content"].strip() for message in prompt if message["role"] == "user")
    else:
        repeated = row.messages("prompt") == prompt
    if not repeated:
        raise row.place.at("prompt").fault(
            "prompt_mismatch",
            "not what chosen and rejected begin with, so one of the two is wrong; correct it, or leave prompt out by "
            "form: implicit",
        )


@form("explicit", "prompt", "chosen", "rejected")
def explicit(row: Row) -> Sides:
    """TRL's preference form with its own prompt: three strings, or three lists of messages, of one turn or several."""
    if row.kinds("prompt", "chosen", "rejected") == {"a string"}:
        prompt, chosen, rejected = row.texts("prompt", "chosen", "rejected")
        return prompt, chosen, rejected
    return row.prompt("prompt"), row.turns("chosen"), row.turns("rejected")


@form("single_turn", "prompt", "chosen", "rejected", looks=lambda values: False)
def single_turn(row: Row) -> Sides:
    """Three strings as one question and two answers. Only where it is stated: they may be meant as plain text."""
    asked, *answers = row.texts("prompt", "chosen", "rejected")
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    return [{"role": "user", "content": asked}], chosen, rejected


@form("sharegpt", "conversations", "chosen", "rejected")
def sharegpt(row: Row) -> Sides:
    """ShareGPT turns: the conversation so far, and two messages that could come next."""
    return row.prompt("conversations"), row.answer("chosen"), row.answer("rejected")


@form("openai", "input", "preferred_output", "non_preferred_output")
def openai(row: Row) -> Sides:
    """Rows of OpenAI's preference fine-tuning."""
    asked = row.inside("input")
    refuse_columns(asked)
    return asked.prompt("messages"), row.answer("preferred_output"), row.answer("non_preferred_output")


TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")


def is_transcript(values: Mapping[str, Any]) -> bool:
    texts = [values["chosen"], values["rejected"]]
    return all(isinstance(text, str) and TURN.match(text) and len(TURN.findall(text)) > 1 for text in texts)


@form("hh", "chosen", "rejected", looks=is_transcript)
def hh(row: Row) -> Sides:
    """Transcripts as in Anthropic's HH: `\\n\\nHuman: ...\\n\\nAssistant: ...`, read as a conversation."""
    return split_shared(transcript(row, "chosen"), transcript(row, "rejected"), row.place)


def transcript(row: Row, key: str) -> Messages:
    """The turns of a transcript, without the blanks around them."""
    before, *turns = TURN.split(row.text(key))
    if before.strip() or not turns:
        raise row.place.at(key).fault("no_transcript", "no transcript; it begins with `Human:`, then `Assistant:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


NO_PROMPTS = re.compile(
    r"\w*id|source|dataset|system|tools|others|rationale|group|.*(chosen|rejected|score|rating|model|embedding).*",
    re.IGNORECASE,
)


def other_prompts(values: Mapping[str, Any]) -> list[str]:
    """Columns that may well be the prompt, whatever they hold here; then those of any name that hold text."""
    named = [name for name in ("prompt", *OTHER_NAMES_OF_A_PROMPT) if name in values]
    texts = (key for key, value in values.items() if isinstance(key, str) and isinstance(value, str))
    return [*dict.fromkeys([*named, *(key for key in texts if not NO_PROMPTS.fullmatch(key))])]


def holds_its_prompt(values: Mapping[str, Any]) -> bool:
    """Two conversations, or two strings beside nothing that could be the prompt: any two answers may begin alike."""
    return isinstance(values["chosen"], list) or not other_prompts(values)


@form("implicit", "chosen", "rejected", looks=holds_its_prompt)
def implicit(row: Row) -> Sides:
    """TRL's preference form without a prompt: it is what chosen and rejected begin with."""
    if row.kinds("chosen", "rejected") == {"a list"}:
        return implicit_messages(row)
    chosen, rejected = row.texts("chosen", "rejected")
    if chosen == rejected:
        raise row.place.fault(*EQUAL)
    shared = shared_length(chosen, rejected)
    if chosen[shared] != rejected[shared]:
        shared -= chosen[:shared].endswith(" ")  # TRL: the blank before an answer is the answer's
    if not shared:
        raise nothing_shared(row.place)
    return chosen[:shared], chosen[shared:], rejected[shared:]


@form("whole_conversations", "chosen", "rejected", looks=lambda values: False)
def whole_conversations(row: Row) -> Sides:
    """Two conversations that part after a shared beginning and go on for several turns. Only where it is stated.

    The prompt is what they share, up to a turn of the assistant's; a `prompt` column must say the same.
    """
    chosen, rejected = row.messages("chosen"), row.messages("rejected")
    shared = shared_length(chosen, rejected)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1  # they part in what a user says: the turn before is the first of both
    if not shared:
        raise nothing_shared(row.place)
    prompt = check_prompt(chosen[:shared], row.place.at("chosen"))
    if row.values.get("prompt") is not None:
        check_repeated(row, prompt)
    answers = (
        check_turns(chosen, row.place.at("chosen"), shared),
        check_turns(rejected, row.place.at("rejected"), shared),
    )
    return prompt, *answers


def implicit_messages(row: Row) -> Conversations:
    return split_shared(row.messages("chosen"), row.messages("rejected"), row.place)


def split_shared(chosen: Messages, rejected: Messages, place: Place) -> Conversations:
    """Two conversations to what they share and one answer each; equal ones share all but the last message."""
    shared = shared_length(chosen, rejected)
    if not shared:
        raise nothing_shared(place)
    prompt = check_prompt(chosen[:shared], place.at("chosen"))
    answers = check_answer(chosen[shared:], place.at("chosen")), check_answer(rejected[shared:], place.at("rejected"))
    return prompt, *answers


def shared_length(chosen: str | Messages, rejected: str | Messages) -> int:
    """How much both begin with, when each keeps at least its last item."""
    longest = min(len(chosen), len(rejected)) - 1
    return bisect_left(range(longest), True, key=lambda last: chosen[: last + 1] != rejected[: last + 1])


def nothing_shared(place: Place) -> RowFault:
    return place.at("prompt").fault(
        "no_shared_prompt",
        "chosen and rejected share no beginning that could be the prompt; add a `prompt` column with what both answer, "
        "and leave only the answers in chosen and rejected",
    )


# ---- what changes the meaning of a row in any form

OPTIONS = "chat_template_kwargs"  # one row's own, which TRL renders it with
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def refuse_columns(row: Row) -> None:
    """Columns that cannot be honoured and must not be ignored: tools, media, options; unless they are empty."""
    for key in row.values.keys() & {"tools", "functions", OPTIONS, *MEDIA}:
        value = row.values[key]
        if value and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")):
            reason = "media" if key in MEDIA else OPTIONS if key == OPTIONS else "tools"
            message = f"rows with {key} are not supported; remove these rows"
            if key == OPTIONS:
                message += f", or the column where all rows say the same, and set {OPTIONS} to that in the config"
            raise row.place.at(key).fault(reason, message)


def with_system(sides: Sides, row: Row) -> Sides:
    """A `system` column becomes the conversation's first message."""
    system = row.values.get("system")
    if not system:
        return sides
    prompt, chosen, rejected = sides
    place = row.place.at("system")
    message = {"role": "system", "content": read_text(system, place)}
    if isinstance(prompt, str):
        raise place.fault(
            "system_column",
            "a system prompt needs a conversation; state form: single_turn to have prompt, chosen and rejected read as "
            "one, write the row as messages, or put it into prompt",
        )
    if prompt[0]["role"] != "system":
        return [message, *prompt], chosen, rejected
    if prompt[0] != message:
        raise place.fault("system_column", "the conversation has another system message; keep one of the two")
    return sides
