"""Which reference a run has, as a config or `FocalPOConfig` says it, and what is wrong with it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lorafocal.bounds import is_number

BASE = "base"  # among the members of several: the model with its adapters off
ADAPTIVE = "adaptive"  # weights: by how far apart each member holds a pair's answers
COMBINE = ("harmonic", "geometric")

# What the kinds that have settings of their own start from; None has no default and must be said.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"adapter": None},
    "moving": {"every": 512, "mixing": 1.0},
    "several": {"members": None, "combine": "harmonic"},
}
_OF_HARMONIC = {"weights": ADAPTIVE, "clip": 0.1}
KEYS = ("adapter", "every", "mixing", "members", "combine", "weights", "clip")  # of one kind each

_WHERE = {
    "adapter": "kind: adapter (a finished adapter)",
    **dict.fromkeys(("every", "mixing"), "kind: moving"),
    **dict.fromkeys(("members", "combine", "weights", "clip"), "kind: several"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """What the policy is compared with: `kind` is one of `lorafocal.reference.REFERENCES`, None for no reference.

    `adapter` is the folder of a finished one. `every` so many optimiser steps a moving reference becomes `mixing` of
    the policy and 1 - `mixing` of itself. `members` of several are `BASE` or folders; their log-probs are combined with
    `weights` (a number each, or `ADAPTIVE`), the harmonic ones within `clip` of the first member's. `guide` is the
    folder of one more adapter, for objectives that ask for its log-probs.
    """

    kind: str | None
    adapter: str | None = None
    every: int | None = None
    mixing: float | None = None
    members: Sequence[str] | None = None
    combine: str | None = None
    weights: Sequence[float] | Literal["adaptive"] | None = None
    clip: float | None = None
    guide: str | None = None

    @property
    def word(self) -> str:
        """The compatibility table's, which tells a copy that moves from an average."""
        averages = self.kind == "moving" and self.mixing is not None and self.mixing < 1
        return "moving-soft" if averages else self.kind or "none"

    @property
    def folders(self) -> tuple[str, ...]:
        """Of the adapters that are put beside the policy's to be the reference, in the order of their names there."""
        if self.kind == "adapter" and self.adapter is not None:
            return (self.adapter,)
        return tuple(member for member in self.members or () if member != BASE)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must find again, but for where adapters lie; {} for a kind without any."""
        kept = {key: getattr(self, key) for key in KEYS if key not in ("adapter", "members")}
        found = {key: value for key, value in kept.items() if value is not None}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def strategy_of(values: Mapping[str, Any]) -> Strategy:
    """The strategy that `values` say, by the names of its fields; others are passed over."""
    known = {spec.name for spec in fields(Strategy)}
    return Strategy(**{key: value for key, value in values.items() if key in known})


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what their kind starts from in the place of what is missing or None."""
    usual = dict(DEFAULTS.get(str(values.get("kind")), {}))
    if "combine" in usual:
        geometric = values.get("combine") == "geometric"
        usual |= {"weights": _equal(values.get("members"))} if geometric else _OF_HARMONIC
    return {**values, **{key: value for key, value in usual.items() if values.get(key) is None and value is not None}}


def _equal(members: object) -> list[float] | None:
    return [1 / len(members)] * len(members) if isinstance(members, Sequence) and members else None


def misfits(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of values whose defaults are filled in."""
    kind = values.get("kind")
    own = {*DEFAULTS.get(str(kind), {}), *(("weights", "clip") if kind == "several" else ())}
    for key in KEYS:
        if key not in own and values.get(key) is not None:
            yield key, f"belongs to {_WHERE[key]}; {kind} would ignore it: remove it"
    if kind == "adapter" and values.get("adapter") is None:
        yield "adapter", "missing; kind: adapter needs the folder of a finished adapter on the same base"
    if kind == "moving":
        yield from _misfits_of_moving(values["every"], values["mixing"])
    if kind == "several":
        yield from _misfits_of_several(*(values.get(key) for key in ("members", "combine", "weights", "clip")))


def _misfits_of_moving(every: Any, mixing: Any) -> Iterator[tuple[str, str]]:
    if type(every) is not int or every < 1:
        yield "every", f"is {every!r}; it is a number of optimiser steps, 1 or more (TR-DPO copies every 256 to 512)"
    if not is_number(mixing) or not 0 < mixing <= 1:
        yield (
            "mixing",
            f"is {mixing!r}; it is the policy's share of the moved reference, above 0 to 1 (a copy); TR-DPO averages"
            " with 0.5 to 0.6 every step; to never move it, use frozen_copy or disabled_adapter",
        )


def _misfits_of_several(members: Any, combine: Any, weights: Any, clip: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(members, list | tuple) or len(members) < 2 or not all(isinstance(m, str) and m for m in members):
        yield "members", f"is {members!r}; kind: several needs two or more of: {BASE}, or an adapter's folder"
        return
    if combine not in COMBINE:
        yield "combine", f"is {combine!r}; choose {' or '.join(COMBINE)}"
        return
    if combine == "geometric" and clip is not None:
        yield "clip", "the geometric mean clips nothing and would ignore it; remove it, or use combine: harmonic"
    if combine == "geometric" and weights == ADAPTIVE:
        yield "weights", "adaptive ones belong to combine: harmonic; give the geometric mean a number for each member"
    elif weights != ADAPTIVE:
        yield from _misfits_of_weights(weights, members)
    if combine == "harmonic" and (not is_number(clip) or clip <= 0):
        yield (
            "clip",
            f"is {clip!r}; it is a number above 0, the share by which other members' log-probs may differ from the"
            " first one's (MRPO: 0.1; a large one clips nothing, and 0 would leave the first member alone)",
        )


def _misfits_of_weights(weights: Any, members: Sequence[str]) -> Iterator[tuple[str, str]]:
    numbers = isinstance(weights, list | tuple) and all(is_number(weight) and weight > 0 for weight in weights)
    if not numbers or len(weights) != len(members) or abs(sum(weights) - 1) > 1e-6:
        yield "weights", f"are {weights!r}; give {len(members)} numbers above 0 that sum to 1, a member each"


def refusals(values: Mapping[str, Any], entry: Any) -> Iterable[tuple[str, str]]:
    """(key, why an objective, by its `objectives.Entry`, does not go with these values)."""
    if entry.guide and values.get("guide") is None:
        yield "guide", "missing; this objective needs the folder of one more adapter on the same base, its guide"
    if not entry.guide and values.get("guide") is not None:
        yield "guide", "this objective asks for no guide and would ignore it; remove it"
    if entry.divergences and values.get("kind") == "cached":
        yield (
            "kind",
            "cached log-probs are of the answers' tokens alone, and this objective compares with the reference's whole"
            " distribution at each: use a live reference (disabled_adapter, frozen_copy or separate_model)",
        )
    if values.get("kind") != "several":
        return
    if entry.divergences:
        yield "kind", "several references have no distribution over tokens, which this objective compares: use one"
    if values.get("combine") == "harmonic" and (entry.token_weights or entry.others):
        yield (
            "combine",
            "harmonic is made of the two whole answers of a pair, and this objective weighs tokens or compares further"
            " answers: use combine: geometric",
        )
