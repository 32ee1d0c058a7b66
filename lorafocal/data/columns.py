"""What a row of any form may have beside a pair: further answers, a rationale, a group, an embedding of its prompt.

{"prompt": ..., "chosen": ..., "rejected": ..., "others": ["third answer", {"answer": "fourth", "score": 0.3}],
 "group": "medicine", "prompt_embedding": [0.12, -0.07, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafocal.bounds import is_number
from lorafocal.data.forms import Row, Side, Sides
from lorafocal.data.messages import as_text, check_answer, check_prompt, kind, read_messages, read_text
from lorafocal.data.places import Place

COLUMNS = ("others", "rationale", "group", "prompt_embedding")
KEYS = {"answer", "score", "prompt"}  # of a further answer that is an object

# What the rationale answers, as the paper's own code asks it (reds-lab/preference-learning-with-rationales, its general
# rationales): one user's turn that holds the prompt and both answers, the chosen one always first.
WHY = (
    "Given the prompt:\n{prompt}\nWhich of the following assistant's response is more preferable and strictly follows"
    ' with the prompt question?\nResponse above:"{chosen}"\nor\nResponse below:"{rejected}"?\n'
)


@dataclass(frozen=True, slots=True)
class FurtherAnswer:
    """One more answer that goes with a pair, in the form of the pair's own: to its prompt, or to one of its own."""

    answer: Side
    prompt: Side | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """What was there."""

    others: tuple[FurtherAnswer, ...] = ()
    group: str | None = None
    embedding: tuple[float, ...] | None = None


def read_columns(row: Row, sides: Sides) -> Columns:
    """The optional columns of a row whose pair is `sides`. Raises RowFault."""
    if not row.values.keys() & {*COLUMNS}:
        return Columns()
    others, rationale = (row.values.get(key) for key in ("others", "rationale"))
    if others is not None and rationale is not None:
        raise row.place.at("rationale").fault(
            "two_columns", "a row has further answers in `others` or in `rationale`, not in both; leave one out"
        )
    further: tuple[FurtherAnswer, ...] = ()
    if others is not None:
        further = read_others(others, row.place.at("others"), sides[0])
    elif rationale is not None:
        further = (why(row.text("rationale"), sides),)
    return Columns(further, read_group(row), read_embedding(row))


# ---- further answers


def read_others(value: Any, place: Place, prompt: Side) -> tuple[FurtherAnswer, ...]:
    """A list of answers, or one alone: texts, messages, or objects with a score or a prompt of their own."""
    if isinstance(value, str | Mapping):
        return (read_other(value, place, prompt),)
    if not isinstance(value, list):
        raise place.fault("wrong_type", f"expected a list of further answers, found {kind(value)}; write it as one")
    return tuple(read_other(item, place.at(f"[{number}]"), prompt) for number, item in enumerate(value))


def read_other(value: Any, place: Place, prompt: Side) -> FurtherAnswer:
    """One further answer, in the form that `prompt` has."""
    if not isinstance(value, Mapping) or not value.keys() & KEYS:
        return FurtherAnswer(_answer(value, place, prompt))
    given = {key: item for key, item in value.items() if item is not None}  # a table has nulls where an object had none
    if extra := sorted(map(str, given.keys() - KEYS)):
        says = f"further answers with {', '.join(extra)[:80]} are not read; known: {', '.join(sorted(KEYS))}"
        raise place.fault("unknown_keys", says)
    if "answer" not in given:
        raise place.fault("no_answer", "no `answer`, a text or a message; give it one, or leave the object out")
    answer = _answer(given["answer"], place.at(".answer"), prompt)
    own = _prompt(given["prompt"], place.at(".prompt"), prompt) if "prompt" in given else None
    return FurtherAnswer(answer, own, read_score(given.get("score"), place.at(".score")))


def _answer(value: Any, place: Place, prompt: Side) -> Side:
    """A text, which becomes a message beside conversations, or one message of the assistant."""
    if isinstance(value, str):
        text = read_text(value, place)
        if not text:
            raise place.fault("empty_completion", "empty; leave the answer out or give it a text")
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    messages = check_answer(read_messages(value, place), place)
    if len(messages) > 1:
        raise place.fault("long_answer", f"{len(messages)} messages; a further answer is one of the assistant's")
    if isinstance(prompt, str):
        raise place.fault("mixed_types", "messages beside a pair of plain texts; give all of them in the same form")
    return messages


def _prompt(value: Any, place: Place, prompt: Side) -> Side:
    """A text, which becomes a user's message beside conversations, or a conversation that waits for the assistant."""
    if isinstance(value, str):
        text = read_text(value, place)
        if not text:
            raise place.fault("empty_prompt", "empty; leave the prompt out or give it a text")
        return text if isinstance(prompt, str) else [{"role": "user", "content": text}]
    if isinstance(prompt, str):
        raise place.fault("mixed_types", "messages beside a pair of plain texts; give all of them in the same form")
    return check_prompt(read_messages(value, place), place)


def why(rationale: str, sides: Sides) -> FurtherAnswer:
    """A rationale as the answer to the question which of the two answers is better."""
    asked, chosen, rejected = (as_text(side, "\n") for side in sides)
    question = WHY.format(prompt=asked, chosen=chosen, rejected=rejected)
    if isinstance(sides[0], str):
        return FurtherAnswer(rationale, question)
    return FurtherAnswer([{"role": "assistant", "content": rationale}], [{"role": "user", "content": question}])


# ---- numbers and names


def read_score(score: Any, place: Place) -> float | None:
    """A finite number, which CSV spells as text, or None where there is none."""
    if score is None:
        return None
    try:
        number = math.nan if isinstance(score, bool) or not isinstance(score, int | float | str) else float(score)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        found = repr(score)[:40] if isinstance(score, str | float | bool) else kind(score)
        raise place.fault("bad_score", f"expected a finite number, found {found}; correct it or leave the key out")
    return number


def read_group(row: Row) -> str | None:
    """What tells the row's group: a text, or a number or truth value as one."""
    group = row.values.get("group")
    if group is None:
        return None
    if not isinstance(group, str | int) or group == "":
        found = "an empty text" if group == "" else kind(group)
        raise row.place.at("group").fault(
            "bad_group", f"expected a text or a whole number, found {found}; correct it or leave the column out"
        )
    return read_text(str(group), row.place.at("group"))


def read_embedding(row: Row) -> tuple[float, ...] | None:
    """A list of finite numbers that are not all zero."""
    place, numbers = row.place.at("prompt_embedding"), row.values.get("prompt_embedding")
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not numbers:
        raise place.fault("bad_embedding", f"expected a list of numbers, found {kind(numbers)}; write it as one")
    for position, number in enumerate(numbers):
        if not is_number(number):
            found = repr(number)[:40] if isinstance(number, str | float | bool) else kind(number)
            raise place.at(f"[{position}]").fault("bad_embedding", f"expected a finite number, found {found}")
    if not any(numbers):
        raise place.fault("bad_embedding", "all of its numbers are 0, so it points nowhere; make it again")
    return tuple(map(float, numbers))
