"""What may change between the run that was interrupted and the one that resumes it.

Resuming promises the weights of an uninterrupted run, bit for bit on a CPU. So a setting may change only if
it cannot reach the weights, or no more than their last bits where a run could not go on otherwise; every other
change is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lorafocal.errors import InputError
from lorafocal.schema import Evaluation

MAY_CHANGE: dict[str, str] = {
    "training.logging_steps": "how often metrics are written does not touch the weights",
    "training.logging_strategy": "as logging_steps",
    "training.logging_first_step": "as logging_steps",
    "training.eval_steps": "evaluation reads the weights only",
    "training.eval_strategy": "evaluation reads the weights only",
    "training.eval_on_start": "evaluation reads the weights only",
    "training.save_steps": "saving reads the weights only",
    "training.save_strategy": "saving reads the weights only",
    "training.save_total_limit": "concerns old checkpoints only",
    "training.dataloader_num_workers": "the order of the pairs is a function of seed and epoch alone",
    "training.dataloader_prefetch_factor": "as dataloader_num_workers",
    "training.dataloader_persistent_workers": "as dataloader_num_workers",
    "training.ddp_timeout": "how long processes wait for each other does not touch the weights",
    "training.log_level": "display only",
    "training.log_level_replica": "display only",
    "data.cache": "what is tokenised again gives the same tokens",
    "packing.tokens": "memory and speed, never the result but for its last bits: another split into packs adds in"
    " another order",
    "training.report_to": "where metrics are sent does not touch the weights",
    "training.run_name": "a label for metric services",
    **dict.fromkeys(
        (f"evaluation.{key}" for key in Evaluation.model_fields), "answering on the way reads the weights only"
    ),
}
"""Config keys that may differ on resume, with the reason; the manifest stores this table."""

MAY_MOVE: dict[str, str] = {
    "engine.kind": "every engine trains the same run but for its last bits, from checkpoints by parameter name",
    "engine.offload": "where states lie does not touch the weights",
}
"""As `MAY_CHANGE`; but what a recipe says of them is part of it."""

WHY_NOT: dict[str, str] = {
    "training.max_steps": "the learning-rate schedule is stretched over it",
    "training.num_train_epochs": "the learning-rate schedule is stretched over it",
    "training.pairs_per_step": "it decides which pairs make a step",
    "training.seed": "it decides the adapter's first values",
    "training.data_seed": "it decides the order of the pairs",
    "packing.layout": "another layout adds in another order, so the last bits differ",
    "kernels.adapters": "other kernels round otherwise, so the last bits differ",
    "kernels.elementwise": "other kernels round otherwise, so the last bits differ",
    "kernels.compile": "compiled layers round otherwise, so the last bits differ",
    "base.config_sha256": "the base's config.json is not the one of training",
    "reference_model.config_sha256": "the reference model's config.json is not the one of training",
}
"""Reasons worth printing, for keys likely to be changed; every key not in `MAY_CHANGE` is refused."""

IDENTITY = ("base", "reference_model", "reference_adapters", "data")
"""Manifest sections beside `config` that must be equal: fingerprints of the models, their configs and the data."""

LATER = (
    "data.train.scores_sha256", "data.eval.scores_sha256", "base.config_sha256", "reference_model.config_sha256",
)  # fmt: skip
"""Digests that earlier manifests lack: of scores, which those runs did not read, and of a model's config.json, of which
nothing was known."""

PLACES = {"adapter.start_from": "start_from", "model.name": "base", "reference.model": "reference_model"}
"""Config keys that name a place, with the manifest section whose `sha256` is of the weights there: these may move."""

NOTED = ("versions", "processes", "threads", "hardware")
"""Manifest sections whose change is allowed, but ends the promise of equal bits."""

_ABSENT = "(absent)"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """One line "key: old -> new" for each dotted key that differs and is not in `may_change`, sorted.

    An absent key and one that is None are the same: manifests of before a key existed lack it.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in may_change and _shown(before, key) != _shown(after, key)
    ]


def check_resumable(old_manifest: Mapping[str, Any], new_manifest: Mapping[str, Any]) -> list[str]:
    """Raises `InputError` naming every forbidden change; returns notes about the allowed ones, to be printed.

    Of a manifest these sections are read: `config` (the resolved config), `base` and `data` (fingerprints),
    `versions`, `processes`, `threads` and `hardware`. An absent section counts as empty. The run's `name` is part of
    `config`.
    """
    old, new = old_manifest.get("config", {}), new_manifest.get("config", {})
    may_change = MAY_CHANGE | MAY_MOVE | _moved(old_manifest, new_manifest)
    refused = [_with_reason(line) for line in changes(old, new, may_change)]
    refused += map(_with_reason, changed_inputs(old_manifest, new_manifest))
    if refused:
        raise InputError(
            "this run cannot be resumed, because its result would differ from an uninterrupted run:\n  "
            + "\n  ".join(refused)
            + "\nset these back to the old values, or start a new run under another name"
        )
    allowed = changes(old, new, ())
    noted = changes(_sections(old_manifest, *NOTED), _sections(new_manifest, *NOTED), ())
    return [f"{line} (allowed: {may_change[_key(line)]})" for line in allowed] + [
        f"{line} (the last bits may differ from an uninterrupted run)" for line in noted
    ]


def changed_inputs(old_manifest: Mapping[str, Any], new_manifest: Mapping[str, Any]) -> list[str]:
    """`changes` of the models and data that go in, as far as the old manifest knows them."""
    before = _sections(old_manifest, *IDENTITY)
    unread = [key for key in LATER if key not in dict(_flat(before))]
    return changes(before, _sections(new_manifest, *IDENTITY), unread)


def _moved(old_manifest: Mapping[str, Any], new_manifest: Mapping[str, Any]) -> dict[str, str]:
    """The keys of places whose weights are known and the same, with the reason why these may change."""
    digests = {
        key: [(manifest.get(section) or {}).get("sha256") for manifest in (old_manifest, new_manifest)]
        for key, section in PLACES.items()
    }
    return {key: "the same weights, in another place" for key, (old, new) in digests.items() if old and old == new}


def _with_reason(line: str) -> str:
    reason = WHY_NOT.get(_key(line))
    return f"{line} ({reason})" if reason else line


def _key(line: str) -> str:
    return line.partition(": ")[0]


def _sections(manifest: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: manifest.get(name, {}) for name in names}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return _ABSENT if values.get(key) is None else repr(values[key])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves, tuples read as lists (as JSON has them)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
