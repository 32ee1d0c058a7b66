"""`lorafocal objectives`: what there is to choose from, and what one of them needs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal import recipes
from lorafocal.bounds import Range
from lorafocal.objectives import entry_of
from lorafocal.objectives.entry import OTHERS, SCORES, Entry, Parameter
from lorafocal.objectives.factor import refusal
from lorafocal.objectives.registry import FAMILIES


def needs_of(entry: Entry) -> list[str]:
    """What an objective asks for beside a pair's two answers, in words."""
    found = {
        "a reference": entry.reference,
        "no rejected answer": not entry.rejected,
        f"a judge's scores, {SCORES.get(entry.scores or '')}": entry.scores,
        "the reference's distribution over the vocabulary": entry.divergences,
        "log-probs of single tokens": entry.token_weights,
        "a guide (reference.guide)": entry.guide,
        str(OTHERS.get(entry.others or "")): entry.others,
        "a group of each row": entry.groups,
        "an embedding of each prompt": entry.embeddings,
        "a pass over the whole step first": entry.whole_step,
    }
    return [words for words, needed in found.items() if needed]


def _range(parameter: Parameter) -> str | None:
    """What it must be, with published values."""
    return str(parameter.check) if isinstance(parameter.check, Range) else None


@dataclass(frozen=True, slots=True)
class Described:
    """One objective, for somebody who is about to write a config."""

    name: str
    entry: Entry

    @property
    def config(self) -> Path:
        """The config that trains it."""
        return recipes.folder().parent / "objectives" / f"{self.name}.yaml"

    @property
    def what(self) -> str:
        """Its paper and what it does: the first line of its config."""
        return self.config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")

    @property
    def takes_factor(self) -> bool:
        """Whether a focal factor may be put around it."""
        return refusal(self.name, self.entry) is None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "parameters": {
                key: {"default": of.default, "stated": of.stated, "help": of.help, "range": _range(of)}
                for key, of in self.entry.parameters.items()
            },
            "needs": needs_of(self.entry),
            "focal_factor": self.takes_factor,
            "config": str(self.config),
        }

    @property
    def line(self) -> str:
        """In one line of a list."""
        keys = [key if of.stated else f"{key} ({of.default:g})" for key, of in self.entry.parameters.items()]
        return f"  {self.name:<22} {', '.join(keys)}".rstrip()

    def table(self) -> str:
        lines = [f"{self.name}: {self.what}", ""]
        for key, of in self.entry.parameters.items():
            given = f"to be stated; {of.default:g} in its config" if of.stated else f"{of.default:g}"
            lines.append(f"  objective.{key} ({given}): {of.help}")
            lines += [f"      {told}"] if (told := _range(of)) else []
        lines += ["", f"needs: {'; '.join(needs_of(self.entry)) or 'nothing but the pairs'}"]
        factor = "takes the focal factor (objective.focal)" if self.takes_factor else "takes no focal factor around it"
        return "\n".join([*lines, factor, f"a config that trains it: {self.config}"])


@dataclass(frozen=True, slots=True)
class Listing:
    """All objectives, family by family."""

    families: Mapping[str, Sequence[Described]]

    def as_dict(self) -> dict[str, Any]:
        return {"objectives": [one.as_dict() for family in self.families.values() for one in family]}

    def table(self) -> str:
        lines = [
            line for family, all_of in self.families.items() for line in (family, *(one.line for one in all_of), "")
        ]
        return "\n".join([*lines, "more on one: lorafocal objectives NAME"])


def described(name: str | None) -> Described | Listing:
    """One objective, or all of them. Raises InputError for a name that is not known."""
    if name is not None:
        return Described(name, entry_of(name))
    return Listing({what: [Described(*item) for item in family.items()] for what, family in FAMILIES.items()})
