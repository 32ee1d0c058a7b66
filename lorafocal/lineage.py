"""Where an adapter or a model comes from: the file `lorafocal.json` beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafocal.compatibility import QUANTIZED
from lorafocal.errors import InputError
from lorafocal.versions import __version__

LINEAGE_FILE = "lorafocal.json"
# 2: a base may have been quantised in training, which a reader of 1 would take for a float one.
# 3: a stage may have trained every weight, which a reader of 2 would take for an adapter. Written where one did.
# 4: an objective may have a focal factor or a guard, which a reader of 3 would leave out. Written where one has.
FORMAT, FORMAT_OF_FULL, FORMAT_OF_FACTOR = 2, 3, 4
READ_FORMATS = (1, FORMAT, FORMAT_OF_FULL, FORMAT_OF_FACTOR)


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base model: hub id (or a local folder's last name, never a path), hub revision, digest of its weights."""

    name: str
    revision: str | None
    sha256: str


MERGED, CONTINUED, COMBINED = "merged", "continued", "combined"
FULL = "full"


@dataclass(frozen=True, slots=True)
class Stage:
    """An adapter on the way to these weights: its folder's name, digest of its weights file, and what trained it.

    `how` says where it went: "merged" into the base that the next stage was trained on (or into the model that this
    is), "continued" by the next stage as its start, or "combined" with others: its change times the signed `weight`,
    which only these stages have. A "full" stage is no adapter: it trained every weight, and its digest is that of the
    whole model, as of a base. `quantization` is what its base was quantised to in training: where it was merged,
    then into that base de-quantised, or into the floats that it was made of (`merge.json` says which).
    """

    adapter: str
    sha256: str
    how: str = MERGED
    objective: Mapping[str, Any] | None = None
    reference: str | None = None
    steps: int | None = None
    pairs_seen: int | None = None
    quantization: str | None = None
    weight: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """A JSON object; an older reader, which knows no weights, still reads the stages that have none."""
        record = asdict(self)
        return record if self.weight is not None else {key: record[key] for key in record if key != "weight"}

    def __str__(self) -> str:
        if self.how == FULL and self.objective is not None:
            return f"the {self.objective['name']} training of all weights (sha256 {self.sha256[:12]}...)"
        made_by = "an adapter of unknown making" if self.objective is None else f"the {self.objective['name']} adapter"
        return f"{made_by} {self.adapter!r} (sha256 {self.sha256[:12]}...)"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What made these weights.

    `base` is the model that was trained, that the adapter was trained on, or was merged into. `objective` is its name
    with its parameters, or None where an adapter of another tool was merged. `parents` are all earlier stages, the
    oldest first; of a merged model the adapter itself too, and of a wholly trained one its own training. `origin` is
    the model before the first stage, where that is not `base`. `quantization` (nf4, nf4-double, fp4, fp4-double, int8
    or None) is what `base` was quantised to in training; a merged model with one was made of that base de-quantised.
    `dtype` is what `base` was loaded in, whatever it is stored in; None where that is not known. `base_config_sha256`
    is of what `base`'s config.json has its weights compute (`model.base_config`); files of earlier versions lack it.
    """

    base: BaseIdentity
    objective: Mapping[str, Any] | None
    steps: int
    pairs_seen: int
    reference: str | None = "disabled_adapter"
    parents: tuple[Stage, ...] = ()
    origin: BaseIdentity | None = None
    quantization: str | None = None
    dtype: str | None = None
    base_config_sha256: str | None = None
    lorafocal: str = ""

    @classmethod
    def untrained(cls, base: BaseIdentity) -> Lineage:
        """Of weights on `base` that no recorded training made: another tool's, or made of other adapters."""
        return cls(base, objective=None, steps=0, pairs_seen=0, reference=None)

    @property
    def reference_kind(self) -> str | None:
        """`reference` without the settings and adapters that may stand behind a colon."""
        return self.reference and self.reference.partition(":")[0]

    @property
    def start(self) -> Stage | None:
        """The adapter that this one was continued from."""
        return self.parents[-1] if self.parents and self.parents[-1].how == CONTINUED else None

    @property
    def contained(self) -> tuple[Stage, ...]:
        """The earlier adapters that this one contains: those after the last that ended in a base."""
        in_base = max((n for n, stage in enumerate(self.parents, 1) if stage.how in (MERGED, FULL)), default=0)
        return self.parents[in_base:]

    @property
    def merged(self) -> tuple[Stage, ...]:
        """The stages that were merged on the way."""
        return tuple(stage for stage in self.parents if stage.how == MERGED)

    @property
    def first_base(self) -> BaseIdentity:
        """The model before every stage."""
        return self.origin or self.base

    @property
    def combined(self) -> tuple[Stage, ...]:
        """The adapters whose weighted sum this is, or was before it was merged; none where it was trained itself."""
        own = replace(self, parents=self.parents[:-1]) if self.parents[-1:] and self.parents[-1].how == MERGED else self
        stages = own.contained
        return tuple(stage for stage in stages if stage.how == COMBINED) if stages and stages[-1].weight else ()

    def stage(self, adapter: str, sha256: str, how: str) -> Stage:
        """This adapter as a parent of what is made of it."""
        if self.objective is None:
            return Stage(adapter, sha256, how, quantization=self.quantization)
        made = (self.objective, self.reference, self.steps, self.pairs_seen, self.quantization)
        return Stage(adapter, sha256, how, *made)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the file; `format` rises when a reader of the old one would misread the new one.

        `start` repeats the last parent for people; it is not read.
        """
        version = self.lorafocal or __version__
        start = self.start
        return {
            "format": self._format(),
            "lorafocal": version,
            "base": asdict(self.base),
            "base_config_sha256": self.base_config_sha256,
            "quantization": self.quantization,
            "dtype": self.dtype,
            "origin": None if self.origin is None else asdict(self.origin),
            "start": None if start is None else {"adapter": start.adapter, "sha256": start.sha256},
            "parents": [parent.as_dict() for parent in self.parents],
            "reference": self.reference,
            "objective": None if self.objective is None else dict(self.objective),
            "steps": self.steps,
            "pairs_seen": self.pairs_seen,
        }

    def _format(self) -> int:
        """The lowest whose readers understand all of this."""
        objectives = [self.objective, *(stage.objective for stage in self.parents)]
        if any("focal" in objective or "guard" in objective for objective in objectives if objective):
            return FORMAT_OF_FACTOR
        return FORMAT_OF_FULL if any(stage.how == FULL for stage in self.parents) else FORMAT

    def write(self, folder: Path) -> None:
        """Write `lorafocal.json` into `folder`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / LINEAGE_FILE).write_text(text, encoding="utf-8")


def lineage_of(folder: Path) -> Lineage | None:
    """Read `folder/lorafocal.json`; None where there is none (an adapter of another tool).

    Raises InputError naming the file where it is not readable as this format.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["format"]
        if found not in READ_FORMATS:
            raise InputError(
                f"{path}: format {found!r}; only 1 to {FORMAT_OF_FACTOR} are read. Use the version that wrote it."
            )
        if (held := record.get("quantization")) not in (None, *QUANTIZED):
            raise InputError(
                f"{path}: quantization {held!r}; known are {', '.join(QUANTIZED)} and null. Restore it from the run."
            )
        return Lineage(
            base=BaseIdentity(**record["base"]),
            objective=record["objective"],
            steps=record["steps"],
            pairs_seen=record["pairs_seen"],
            reference=record["reference"],
            parents=tuple(Stage(**parent) for parent in record["parents"]),
            origin=BaseIdentity(**record["origin"]) if record.get("origin") else None,
            quantization=held,
            dtype=record.get("dtype"),
            base_config_sha256=record.get("base_config_sha256"),
            lorafocal=record["lorafocal"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a lineage file ({type(error).__name__}: {error}). "
            "Restore it from the run, or delete it to treat the adapter as one of another tool."
        ) from error
