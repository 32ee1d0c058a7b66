"""What a run was made of, as its manifest has it: recipe and deviations, digests of its inputs, batch and machine.

Manifests may come from strangers: whatever is not as expected is left out, and of a place only its last name is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lorafocal.report.read import RunRecord

NOTHING = "–"
SHOWN_DIGITS = 16  # of a digest; the manifest has the rest


class Deviation(NamedTuple):
    """One value that a run has otherwise than its recipe, as text; `mark` says where the recipe's is from."""

    key: str
    recipe: str
    here: str
    mark: str


def recipe_of(record: RunRecord) -> str | None:
    """The name of the recipe that a run is measured against; None where it names none."""
    name = mapping(record.manifest.get("recipe")).get("name")
    return name if isinstance(name, str) else None


def deviations(record: RunRecord) -> list[Deviation]:
    """What a run does otherwise than its recipe, key by key; empty where it repeats it exactly, or names none."""
    found = mapping(record.manifest.get("recipe")).get("deviations")
    entries = [mapping(entry) for entry in found] if isinstance(found, list) else []
    return [Deviation(*(value_text(entry.get(key)) for key in ("key", "recipe", "here", "mark"))) for entry in entries]


def lines(record: RunRecord) -> list[str]:
    """Recipe and deviations for a terminal; none where the run names no recipe."""
    if recipe_of(record) is None:
        return []
    found = (f"  {one.key}: {one.recipe} -> {one.here} (the recipe's is {one.mark})" for one in deviations(record))
    return [f"recipe {_summary(record)}", *found]


def as_dict(record: RunRecord) -> dict[str, Any] | None:
    """Recipe and deviations for a program; None where the run names no recipe."""
    name = recipe_of(record)
    return None if name is None else {"name": name, "deviations": [one._asdict() for one in deviations(record)]}


def made_of(record: RunRecord) -> dict[str, str]:
    """What went into a run, in words: name to text, without what its manifest lacks."""
    manifest = record.manifest
    data, batch, seeds = (mapping(manifest.get(key)) for key in ("data", "effective_batch", "seeds"))
    found = {
        "recipe": _summary(record),
        "base": _model(manifest.get("base")),
        "reference model": _model(manifest.get("reference_model")),
        **{
            f"adapter of the reference ({name}), sha256": _digest(digest)
            for name, digest in mapping(manifest.get("reference_adapters")).items()
        },
        "adapter at the start, sha256": _digest(mapping(manifest.get("start_from")).get("sha256")),
        "chat template, sha256": _digest(manifest.get("chat_template_sha256")),
        **{f"tokens of {part}, sha256": _digest(mapping(found).get("tokens_sha256")) for part, found in data.items()},
        "pairs of a step": value_text(batch.get("pairs")),
        "of them in a process": value_text(batch.get("pairs_per_process")),
        "processes": value_text(manifest.get("processes")),
        "engine": value_text(mapping(manifest.get("engine")).get("kind")),
        "seeds": ", ".join(f"{name} {value_text(value)}" for name, value in seeds.items()),
    }
    return {name: text for name, text in found.items() if text not in ("", NOTHING)}


def _summary(record: RunRecord) -> str:
    """The recipe, and how closely it was followed; empty where the run names none."""
    name, others = recipe_of(record), len(deviations(record))
    if name is None:
        return ""
    return f"{name}, {f'but for {others} value' + 's' * (others != 1) if others else 'exact'}"


def _model(entry: Any) -> str:
    """Name, commit and digest of a model."""
    model = mapping(entry)
    revision = model.get("revision")
    parts = [value_text(model.get("name")), f"commit {value_text(revision)}" if revision else ""]
    digest = _digest(model.get("sha256"))
    return ", ".join([*filter(None, parts), f"sha256 {digest}"]) if digest else ""


def _digest(value: Any) -> str:
    return value[:SHOWN_DIGITS] if isinstance(value, str) else ""


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def value_text(value: Any) -> str:
    """A setting as text; of a place on this machine its last name alone."""
    if value is None:
        return NOTHING
    shown = _without_folders(value)
    return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return f"…/{PurePosixPath(value).name}" if value.startswith(("/", "~/")) else value
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    return [_without_folders(inner) for inner in value] if isinstance(value, list) else value
