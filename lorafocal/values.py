"""The values of a config one by one: types whose mistakes say what was found and what is allowed."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorafocal.compatibility import QUANTIZED
from lorafocal.memory import TIERS
from lorafocal.training_fields import RULES

INITS = r"default|gaussian|orthogonal|pissa(_niter_[1-9][0-9]*)?|olora|loftq|eva"


def _matching(pattern: str, allowed: str) -> BeforeValidator:
    """Text that matches a whole expression, whose meaning is `allowed`."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(pattern, value):
            raise ValueError(f"found {value!r}; allowed: {allowed}")
        return value

    return BeforeValidator(check)


RunName = Annotated[
    str,
    _matching(
        r"[a-z0-9][a-z0-9._-]{0,63}",
        "at most 64 lower-case letters, digits, dots, dashes and underscores, a letter or digit first",
    ),
]
Revision = Annotated[
    str | None, _matching(r"[0-9a-f]{40}", "the 40 hex digits of a commit, for a branch may change under a run")
]


def _place(value: Any) -> Any:
    """A hub id or path that a file system can be asked about without an error of its own."""
    if isinstance(value, str) and not _askable(value):
        shown = value if len(value) < 80 else f"{value[:60]}... ({len(value)} characters)"
        raise ValueError(f"found {shown!r}; allowed: a hub id or path of printable names, each up to 255 bytes")
    return value


def _askable(place: str) -> bool:
    return place.isprintable() and len(place) < 4000 and all(len(name) < 256 for name in place.encode().split(b"/"))


Place = Annotated[str, Field(min_length=1), BeforeValidator(_place)]


def _no_half_precision(value: Any) -> Any:
    if value in ("float16", "fp16", "half"):
        raise ValueError(f"found {value!r}; {RULES['fp16'].reason}")
    return value


def _target_modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise ValueError(f"found {value!r}; allowed: all-linear, or a list of module names such as [q_proj, v_proj]")


def _start(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(INITS, value):
        return value
    raise ValueError(
        f"found {value!r}; allowed: default, gaussian, orthogonal, pissa, pissa_niter_N (N rounds), olora, loftq, eva"
    )


def _quantization(value: Any) -> Any:
    if value is None or value in QUANTIZED:
        return value
    raise ValueError(f"found {value!r}; allowed: {', '.join(QUANTIZED)}, or null for a base in model.dtype")


def _token(value: Any) -> Any:
    if (isinstance(value, str) and value) or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"found {value!r}; allowed: a token's text such as '<|reserved|>', or its id")


def _architecture(value: Any) -> Any:
    if value is not None and not (isinstance(value, dict) and isinstance(value.get("model_type"), str)):
        raise ValueError(f"found {value!r}; allowed: the model's transformers config values, model_type among them")
    return value


def listed(value: Any) -> Any:
    """One source or several, each a name or a mapping, to a list of mappings."""
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("found an empty list; name at least one file or hub id")
    return [{"path": entry} if isinstance(entry, str) else entry for entry in listed]


def _tier(value: Any) -> Any:
    words = {True: "full", False: "none"}
    if isinstance(value, bool):
        return words[value]
    if value in ("auto", *TIERS):
        return value
    raise ValueError(f"found {value!r}; allowed: auto, {', '.join(TIERS)} (true is full, false is none)")


def _token_budget(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: auto, or a number of tokens such as 8192")


def _pairs_or_share(value: Any) -> Any:
    if value is None or (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a number of pairs such as 200, or a share such as 0.05")


Dtype = Annotated[Literal["bfloat16", "float32"], BeforeValidator(_no_half_precision)]
Quantization = Annotated[str | None, BeforeValidator(_quantization)]
Architecture = Annotated[dict[str, Any] | None, BeforeValidator(_architecture)]
Targets = Annotated[Any, BeforeValidator(_target_modules)]
Start = Annotated[str, BeforeValidator(_start)]
Token = Annotated[str | int, BeforeValidator(_token)]
HeldOut = Annotated[int | float | None, BeforeValidator(_pairs_or_share)]
Tier = Annotated[str, BeforeValidator(_tier)]
TokenBudget = Annotated[int | str, BeforeValidator(_token_budget)]
