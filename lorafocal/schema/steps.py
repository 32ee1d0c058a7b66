"""The steps of `data.steps`: what is done to the training pairs between reading and tokenising, each with its keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from lorafocal.schema.mistakes import Section, mistake
from lorafocal.values import Place

OF_THE_ROWS = ("score_gap", "length_gap")
OF_A_FILE = ("margin", "reference_gap", "ches", "ches_normalised")
QUANTITIES = (*OF_THE_ROWS, *OF_A_FILE)
"""What pairs are told apart by (lorafocal/data/steps/quantities.py): from the rows, or from a file of scores."""
BEST_LOW = ("ches", "ches_normalised")  # CHES foretells displacement: its paper keeps the lowest


def _quantity(value: Any) -> Any:
    if value in QUANTITIES:
        return value
    raise ValueError(f"found {value!r}; allowed: {', '.join(QUANTITIES)}")


def _quantities(value: Any) -> Any:
    if not isinstance(value, list):
        return _quantity(value)
    if len(value) < 2 or len(set(map(str, value))) < len(value):
        raise ValueError(f"found {value!r}; a list holds two quantities or more, each once")
    return [_quantity(each) for each in value]


def _keep(value: Any) -> Any:
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a share below 1 such as 0.3, or a number of pairs such as 5000")


def _share(value: Any) -> Any:
    if type(value) in (int, float) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"found {value!r}; allowed: a share above 0, up to 1, such as 0.2")


class _ByQuantity(Section):
    """A step that looks at numbers of pairs, and where it has them from; `unscored` pairs are those the file lacks."""

    by: Annotated[Any, BeforeValidator(_quantities)]
    scores: Place | None = None
    bounds: dict[str, list[float]] | None = None
    unscored: Literal["error", "leave_out"] = "error"

    @property
    def quantities(self) -> list[str]:
        """One, or those that are fused."""
        return self.by if isinstance(self.by, list) else [self.by]

    @model_validator(mode="after")
    def _scores_where_they_are_read(self) -> Any:
        named = self.quantities
        if lacking := [name for name in named if name in OF_A_FILE and self.scores is None]:
            raise mistake(
                "scores", f"missing; {lacking[0]} is read from a file that `lorafocal score RUN PAIRS --out` wrote"
            )
        if self.scores is not None and named == ["score_gap"]:
            raise mistake("scores", "score_gap is of the rows' own scores and would ignore the file; remove it")
        if self.unscored != "error" and self.scores is None:
            raise mistake("unscored", "is about pairs that the file `scores` lacks, and there is none; remove it")
        for name, bounds in (self.bounds or {}).items():
            if len(named) == 1 or name not in named:
                raise mistake("bounds", f"{name} is not among several quantities in `by`; only fused ones have bounds")
            if len(bounds) != 2 or bounds[0] >= bounds[1]:
                raise mistake("bounds", f"{name}: found {bounds}; allowed: two numbers, the lower one first")
        return self


class Select(_ByQuantity):
    """Keep a share, or a number, of the pairs: those where the quantity is highest, lowest, or in the middle."""

    keep: Annotated[int | float, BeforeValidator(_keep)]
    which: Literal["highest", "middle", "lowest"]

    @model_validator(mode="before")
    @classmethod
    def _which(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("which") is None:
            return values | {"which": "lowest" if str(values.get("by")) in BEST_LOW else "highest"}
        return values


class Order(_ByQuantity):
    """Train in this order, in every epoch: nothing shuffles the pairs any more."""

    first: Literal["highest", "lowest"]


class Chunk(Section):
    """The `take`-th of `of` parts of nearly equal size: of the order that a step made, else drawn by `seed`."""

    take: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=2)]
    seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Chunk:
        if self.take > self.of:
            raise mistake("take", f"found {self.take}; there are {self.of} chunks: give 1 to {self.of}")
        return self


class Flip(Section):
    """Label noise: exchange chosen and rejected of about this share of the pairs.

    `scores: follow`: each answer keeps its own; `stay`: the judge is as wrong as the label.
    """

    share: Annotated[float, BeforeValidator(_share)]
    seed: Annotated[int, Field(ge=0)] = 0
    scores: Literal["follow", "stay"] = "follow"


class Pairs(Section):
    """Which pairs a row of several judged answers gives."""

    of: Literal["best_worst", "best_each", "adjacent", "all", "mu_minus_2_sigma", "sets"]


class Step(Section):
    """One step: an object of one key."""

    pairs: Pairs | None = None
    select: Select | None = None
    order: Order | None = None
    chunk: Chunk | None = None
    flip: Flip | None = None

    @property
    def name(self) -> str:
        """The key that it has."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def settings(self) -> Pairs | Select | Order | Chunk | Flip:
        """The section under that key."""
        found: Pairs | Select | Order | Chunk | Flip = getattr(self, self.name)
        return found

    @model_validator(mode="after")
    def _one_key(self) -> Step:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"found {found}; a step has one key of {', '.join(type(self).model_fields)}: write a list")
        return self

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        kept = self.settings.model_dump(mode="json")
        return {self.name: {key: value for key, value in kept.items() if value is not None}}


def misfits(steps: Sequence[Step]) -> str | None:
    """What one step leaves no room for in another; None where they fit together."""
    names = [step.name for step in steps]
    if "pairs" in names[1:]:
        return "pairs says how rows are read: let it be the first step, and the only one of its kind"
    for name in ("order", "flip"):
        if names.count(name) > 1:
            return f"{name} stands there twice, and the second would undo the first; leave one out"
    for number, step in enumerate(steps):
        if step.chunk is not None and step.chunk.seed is not None and "order" in names[:number]:
            return f"{number}.chunk.seed: an order stands before it, which the chunks are of; remove the seed"
    return None


def keeps_order(steps: Sequence[Step] | None) -> bool:
    """Whether a step says in which order pairs are trained."""
    return any(step.order is not None for step in steps or ())


def pairs_left(steps: Sequence[Step] | None, pairs: int) -> int:
    """About how many of `pairs` training pairs the steps leave, by arithmetic alone; of ranked rows one a row."""
    for step in steps or ():
        if step.select is not None:
            keep = step.select.keep
            pairs = round(keep * pairs) if isinstance(keep, float) else min(keep, pairs)
        if step.chunk is not None:
            pairs = len(part_of(step.chunk.take, step.chunk.of, pairs))
    return max(1, pairs)


def held_out_of(size: int | float, pairs: int) -> int:
    """How many of `pairs` a number or a share of them holds out: of a share one at least, and not all."""
    return size if isinstance(size, int) else min(max(1, round(size * pairs)), pairs - 1)


def part_of(take: int, of: int, count: int) -> range:
    """The places of the `take`-th of `of` parts of `count` pairs, whose sizes differ by one at most."""
    return range((take - 1) * count // of, take * count // of)
