"""Random damage to JSON values and to bytes, reproducible from a seed: what rows and configs of the world look like."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 10**40, 0.5, float("nan"), float("inf"), "", " ", "\n", "\0", "\ud800", "<|im_end|>",
    "a" * 5000, "\u202e", "1e-5", "null", "../x", [], {}, [[]], [None], [""], {"": ""}, {"role": "user"},
    [{"role": "user", "content": "x"}], [{"role": "robot", "content": "x"}], [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": ["x"]}], {"from": "gpt", "value": 3}, [{"from": "human"}], {"messages": [1]},
)  # fmt: skip


def damaged(value: Any, rng: random.Random, hits: int | None = None) -> Any:
    """A copy of a JSON value with one to three random changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(hits or rng.choice((1, 1, 1, 2, 3))):
        value = _damage(value, rng)
    return value


def _damage(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(WEIRD)
    owner, key = rng.choice(places)
    change = rng.randrange(6)
    if change == 0:
        del owner[key]
    elif change == 1:
        owner[key] = [owner[key]]
    elif change == 2:
        owner[key] = {"content": owner[key]}
    elif change == 3 and isinstance(owner, dict):
        owner[rng.choice(("prompt", "chosen", "id", "tools", f"{key}x", 7, "messages"))] = owner.pop(key)
    elif change == 4 and isinstance(owner[key], str):
        cut = rng.randrange(len(owner[key]) + 1)
        owner[key] = owner[key][:cut] + str(rng.choice(WEIRD)) + owner[key][cut:]
    else:
        owner[key] = copy.deepcopy(rng.choice(WEIRD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged_bytes(text: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, put in, or everything after a point lost."""
    data = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0:
            del data[at:]
        elif change == 1:
            data[at:at] = rng.choice(
                (b"\xff", b"\x00", b"\n", b'"', b"}", b"\xed\xa0\x80", b"[" * 3000, b"\xef\xbb\xbf")
            )
        elif change == 2 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randrange(1, 6)]
    return bytes(data)
