"""The recipes that come with the package: where they are, what they say of each value, and what a run does otherwise.

A recipe is a config of `configs/paper/`. The comment behind each of its values ends with a mark: [paper: Appendix C],
[inherited: Zephyr ...] or [chosen: why]. Imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lorafocal.errors import InputError
from lorafocal.yaml12 import parse_yaml

RELEASED, RESULTS = "released", "results"  # models to compare with and what the paper prints: no runs
_MARK = re.compile(r"\[(paper|inherited|chosen): ([^\]]+)\]\s*$")


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value is from: stated by the paper, taken over from a recipe it builds on, or chosen by this project."""

    kind: Literal["paper", "inherited", "chosen"]
    source: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.source}"


@dataclass(frozen=True, slots=True)
class Difference:
    """One key in which two configs differ; a value is None too where one of them lacks the key."""

    key: str
    first: Any
    second: Any

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def folder() -> Path:
    """`configs/paper`: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).parent
    return (
        next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package)
        / "paper"
    )


def names() -> list[str]:
    """Every recipe, as a config's `recipe` names it: mistral-7b-focalpo, lora/mistral-7b-focalpo."""
    found = (path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))
    return sorted(name for name in found if name not in (RELEASED, RESULTS) and not name.startswith("parts/"))


def instead(name: str) -> str:
    """What to say beside a name that no recipe has: those most like it, or all."""
    near = difflib.get_close_matches(name, names(), 3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"


def path_of(name: str) -> Path:
    """The file of a recipe. Raises InputError where there is none of that name."""
    if name not in names():
        raise InputError(f"there is no recipe {name!r}; {instead(name)}")
    return folder() / f"{name}.yaml"


def marks(files: Sequence[Path]) -> dict[str, Mark]:
    """The mark of each dotted key in `files`, which are those of one recipe, the weakest first.

    A key without a mark of its own has that of the section it stands in.
    """
    found: dict[str, Mark] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        found |= dict(_marked(yaml.compose(text), text.splitlines(), "", None))
    return found


def _marked(
    node: yaml.Node | None, lines: Sequence[str], prefix: str, above: Mark | None
) -> Iterator[tuple[str, Mark]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        stated = _MARK.search(lines[key.start_mark.line])
        mark = Mark(stated[1], stated[2]) if stated else above  # type: ignore[arg-type]  # one of the three words
        if mark is not None:
            yield f"{prefix}{key.value}", mark
        yield from _marked(value, lines, f"{prefix}{key.value}.", mark)


def mark_of(key: str, known: Mapping[str, Mark]) -> Mark | None:
    """The mark of `key`, or of the nearest section above it that has one."""
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key)


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], ignoring: Collection[str] = ()
) -> list[Difference]:
    """Every dotted key in which two nested configs differ and that is not among `ignoring`, sorted.

    A missing section and one whose values are all None are the same.
    """
    before, after = dict(leaves(first)), dict(leaves(second))
    return [
        Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if key not in ignoring and before.get(key) != after.get(key)
    ]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested config; lists and empty sections are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, slots=True)
class Released:
    """A model that others published, to be generated with and judged: no training of ours."""

    row: str  # of the paper's Table 1: FocalPO, DPO, ...
    family: str  # mistral-7b or llama3-8b
    model: str  # hub id
    trained_from: str  # what it says it was trained from
    mark: Mark


def released() -> list[Released]:
    """The checkpoints behind the rows of the paper's tables, from `configs/paper/released.yaml`."""
    path = folder() / f"{RELEASED}.yaml"
    text = path.read_text(encoding="utf-8")
    entries = parse_yaml(text, source=path.name)["models"]
    known = marks([path])
    return [Released(**entry, model=model, mark=known[f"models.{model}"]) for model, entry in entries.items()]
