"""What all sections of a config have in common, and how their mistakes are collected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

WORDED = "worded"
"""Type of a mistake whose message is already what a person reads."""


class Section(BaseModel):
    """What all sections have in common: unknown keys are mistakes, types are strict, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def default_of(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].default


def all_at_once(section: type[BaseModel], values: Any, handler: Any, more: Iterable[Any]) -> Any:
    """What `handler` makes of `values`, or its mistakes together with `more` of them, as `line_error` takes them."""
    problems: list[Any] = []
    result = None
    try:
        result = handler(values)
    except ValidationError as error:
        problems += error.errors()
    problems += more
    if problems:
        raise ValidationError.from_exception_data(section.__name__, [line_error(problem) for problem in problems])
    return result


def mistake(key: str, message: str) -> ValidationError:
    """One mistake at `key` inside the section whose validator raises it."""
    return mistakes([(key, message)])


def mistakes(problems: Iterable[tuple[str, str]]) -> ValidationError:
    return ValidationError.from_exception_data("config", [line_error(problem) for problem in problems])


def line_error(problem: Any) -> InitErrorDetails:
    """One line of a pydantic error: either ours, a (key, message), or pydantic's own details passed on."""
    if isinstance(problem, tuple):
        key, message = problem
        worded = PydanticCustomError(WORDED, "{message}", {"message": message})
        return {"type": worded, "loc": (key,), "input": None}
    kept = PydanticCustomError(problem["type"], "{message}", {"message": problem["msg"]})
    return {"type": kept, "loc": problem["loc"], "input": problem["input"]}
