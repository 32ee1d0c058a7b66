"""A run once more, from its manifest: the same config on the same inputs, refused by name where these are others.

`config_of` is what to train, `reproduce` trains it. Torch is imported by the latter alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafocal import launch
from lorafocal.config import Config, apply_override, check_config
from lorafocal.errors import InputError
from lorafocal.publish import sha256
from lorafocal.references.strategy import BASE
from lorafocal.resume import MAY_CHANGE, MAY_MOVE, NOTED, changes

if TYPE_CHECKING:
    from lorafocal.run import RunSummary

PLACES = (
    "model.name", "model.revision", "reference.model", "reference.revision", "reference.store", "reference.adapter",
    "reference.members", "reference.guide", "data.train", "data.eval", "data.revision", "adapter.start_from",
)  # fmt: skip
"""Keys that say where an input lies: it may lie elsewhere, for its digest is compared."""

ENGINE = ("engine", *MAY_MOVE, "training.use_cpu")
"""Keys that may change, because every engine and device gives the same run but for its last bits."""

AUTO = {"packing.tokens": "tokens_per_pack", "training.activation_checkpointing": "recompute"}
"""What a config may leave open, and the manifest's word for what it became: the last bits depend on it."""

INPUTS: Mapping[tuple[str, ...], str] = {
    ("base", "sha256"): "the base model's weights: model.name=FOLDER or model.revision=COMMIT names those of then",
    ("base", "config_sha256"): "the base's config.json: restore it, or model.name=FOLDER names that of then",
    ("reference_model", "sha256"): "the reference model's weights: reference.model=FOLDER names those of then",
    ("reference_model", "config_sha256"): "the reference model's config.json: restore it, or name a copy with that of"
    " then by reference.model=FOLDER",
    ("reference_adapters", "1"): "the reference's adapter: reference.adapter=FOLDER or reference.members names it",
    ("reference_adapters", "2"): "the reference's second adapter: reference.members=[FOLDER, ...] names those of then",
    ("reference_adapters", "3"): "the reference's third adapter: reference.members=[FOLDER, ...] names those of then",
    ("reference_adapters", "guide"): "the guide: reference.guide=FOLDER names that of then",
    ("start_from", "sha256"): "the adapter that training starts from: adapter.start_from=FOLDER names that of then",
    ("chat_template_sha256",): "the tokenizer's chat template: model.name=FOLDER names a base that brings that of then",
    ("data", "train", "tokens_sha256"): "the training pairs: data.train=FILE names those of then",
    ("data", "train", "scores_sha256"): "the scores of the training pairs: data.train=FILE names those of then",
    ("data", "eval", "tokens_sha256"): "the held-out pairs: data.eval=FILE names those of then",
    ("data", "eval", "scores_sha256"): "the scores of the held-out pairs: data.eval=FILE names those of then",
}
"""Digests that must be equal, each with what it is of and the way out."""

_FURTHER = "a further adapter of the reference: reference.members=[FOLDER, ...] names those of then"
_TOLD = (*NOTED, "machine")
AGAIN = "-again"
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A run that was done again, and whether it gave the weights of the first."""

    summary: RunSummary
    first: str  # the first run's name
    same: bool | None  # bit for bit; None where the first run's weights do not lie beside its manifest

    def __str__(self) -> str:
        if self.summary.interrupted_by is not None or self.same is None:
            return str(self.summary)
        found = "bit for bit those" if self.same else "not bit for bit those"
        return f"{self.summary}\nits weights are {found} of {self.first}"


def config_of(manifest: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run whose manifest.json is `manifest`, with what `auto` became then, and `-again` in its name.

    `overrides` may say where inputs lie by now, another name, another engine, and what cannot reach the weights. Raises
    InputError for any other, which would make another run, and where `manifest` is none.
    """
    first = read_manifest(manifest)
    values = first["config"]
    values["name"] = f"{str(values.get('name'))[: 64 - len(AGAIN)]}{AGAIN}"
    settled = first.get("settled") or {}
    for key, word in AUTO.items():
        section, _, name = key.partition(".")
        if values.get(section, {}).get(name) == "auto" and word in settled:
            values[section][name] = settled[word]
    for override in overrides:
        apply_override(values, override)
        key = override.partition("=")[0].strip()
        if key not in ("name", *PLACES, *ENGINE, *MAY_CHANGE):
            raise InputError(
                f"{key} would make another run than the one of {manifest}: to it, name, {', '.join(PLACES)}, engine and"
                f" what cannot reach the weights may change; for another run, train {manifest.parent / 'config.yaml'}"
            )
    return check_config(values, source=str(manifest))


def reproduce(
    config: Config, manifest: Path, *, resume: bool = False, quiet: bool = False, runs_dir: Path = Path("runs")
) -> Reproduction:
    """Train `config`, which is `config_of(manifest)`, into `runs_dir`/<its name>, and compare what comes out.

    Raises InputError, before a model is loaded, where base, reference model, template, pairs or first adapter are
    others than they were; other versions and machines are noted.
    """
    from lorafocal.evaluate.during import callbacks
    from lorafocal.run import train

    first = read_manifest(manifest)
    summary = train(
        config,
        resume=resume,
        quiet=quiet,
        runs_dir=runs_dir,
        inspect=lambda new: check_same_inputs(first, new),
        callbacks=callbacks,
    )
    done = launch.is_main() and summary.interrupted_by is None
    same = same_weights(manifest.parent / summary.made, summary.folder / summary.made) if done else None
    return Reproduction(summary, str(first["config"]["name"]), same)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run. Raises InputError where `path` is none."""
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the manifest {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: --repro takes the manifest.json of a run folder") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in ("config", "base")):
        raise InputError(f"{path} is no run's manifest: --repro takes the manifest.json of a run folder")
    return manifest


def check_same_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Notes on what may change the last bits; `old` and `new` are manifests.

    Raises InputError that names every input that is another than it was, each with both digests and the way out.
    """
    others = list(_other_inputs(old, new))
    if others:
        raise InputError("this is not what the run was made of:\n  " + "\n  ".join(others))
    noted = changes(_noted(old), _noted(new), ())
    return [f"{line} (the last bits may differ from the first run)" for line in noted]


def _other_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for path, words in INPUTS.items():
        before, now = _at(old, path), _at(new, path)
        if before is not _MISSING and before != now:  # an older manifest may lack one
            yield f"{'.'.join(path)}: {_shown(before)} -> {_shown(now)}, {words}"
    yield from _other_members(old, new)


def _other_members(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Adapters of a reference that `INPUTS` has no line for, or that it had not, and another place of the base."""
    if "reference_adapters" not in old:
        return
    before, now = ({**(manifest.get("reference_adapters") or {})} for manifest in (old, new))
    for name in sorted({*before, *now}):
        known = name in before and ("reference_adapters", name) in INPUTS
        if not known and before.get(name) != now.get(name):
            yield f"reference_adapters.{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}, {_FURTHER}"
    first, again = (_at(manifest, ("config", "reference", "members")) for manifest in (old, new))
    if isinstance(first, list) and isinstance(again, list):
        places = [[number for number, member in enumerate(found, 1) if member == BASE] for found in (first, again)]
        if places[0] != places[1]:
            yield f"reference.members: {BASE} is at {places[0]} -> {places[1]} of them; keep the order of then"


def _noted(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest.get(key) for key in _TOLD} | {"engine": (manifest["config"].get("engine") or {}).get("kind")}


def _at(manifest: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = manifest
    for key in path:
        value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def _shown(digest: Any) -> str:
    return f"{digest[:12]}..." if isinstance(digest, str) else "none"


def same_weights(first: Path, second: Path) -> bool | None:
    """Whether two folders hold the same safetensors files; None where `first` holds none."""
    before, now = ({path.name: sha256(path) for path in folder.glob("*.safetensors")} for folder in (first, second))
    return before == now if before else None
