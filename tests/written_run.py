"""Run folders written by hand: what a report reads, with nothing trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.evaluations import EvaluatedPair, evaluation_file, write_evaluation

BETA, GAMMA = 0.1, 0.05
QUIET: Mapping[str, float] = {
    "loss": 0.6,
    "grad_norm": 0.5,
    "learning_rate": 1e-4,
    "rewards/chosen": 0.02,
    "rewards/rejected": -0.08,
    "rewards/margins": 0.1,
    "rewards/accuracies": 0.8,
    "rewards/ties": 0.0,
    "logps/chosen": -9.8,
    "logps/rejected": -12.8,
    "logps/reference_chosen": -10.0,
    "logps/reference_rejected": -12.0,
    "displacement/chosen": 0.2,
    "displacement/rejected": -0.8,
    "ranking/reference": 0.6,
    "ranking/policy": 0.65,
    "ranking/lost": 0.0,
    "ranking/won": 0.05,
    "ranking/kept": 1.0,
    "ranking/mended": 0.125,
    "rewards/accuracies_where_right": 0.9,
    "rewards/accuracies_where_wrong": 0.65,
    "rewards/length_correlation": 0.1,
    "focal/chosen_fell_share": 0.2,
    "focal/weight_mean": 0.45,
    "focal/ratio_to_dpo": 0.94,
    "focal/turned_share": 0.0,
    "focal/effective_share": 0.99,
    "pairs_per_s": 12.0,
    "peak_gib": 1.5,
}
"""A training line that no rule has anything to say about."""


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    """QUIET at `step`, with `rewards__margins=...` for "rewards/margins"."""
    return {**QUIET, "step": step, "pairs_seen": 8 * step, **_keys(changes)}


def evaluation_line(step: int, **changes: Any) -> dict[str, Any]:
    """The same as an evaluation of held-out pairs."""
    measured = {key: value for key, value in QUIET.items() if key == "loss" or "/" in key}
    return {f"eval_{key}": value for key, value in {**measured, **_keys(changes)}.items()} | {"step": step}


def pairs(
    chosen: Sequence[float] = (0.2, 0.2), rejected: Sequence[float] = (-0.8, -0.8), references: Sequence[float] = (1, 1)
) -> list[EvaluatedPair]:
    """One row a pair: how far policy is from reference on either side, and the reference's lead of chosen, in nats."""
    return [
        EvaluatedPair(str(n), -10 + lead + plus, -10 + minus, -10 + lead, -10.0)
        for n, (plus, minus, lead) in enumerate(zip(chosen, rejected, references, strict=True))
    ]


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]] | None = None,
    tables: Mapping[int, Sequence[EvaluatedPair]] | None = None,
    *,
    finished: bool = True,
    config: Mapping[str, Any] | None = None,
    manifest: bool = True,
) -> Path:
    """A run folder; `config` maps dotted keys to values."""
    if lines is None:
        lines = [training_line(1), evaluation_line(1), training_line(10), evaluation_line(10)]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, rows in (tables if tables is not None else {1: pairs(), 10: pairs()}).items():
        write_evaluation(evaluation_file(folder, step), rows)
    if finished:
        (folder / "adapter").mkdir()
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(_manifest(config or {})))
    return folder


def _manifest(changes: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"name": "/home/somebody/models/base"},
        "objective": {"name": "focalpo", "beta": BETA, "gamma": GAMMA},
        "training": {"learning_rate": 1e-4, "pairs_per_step": 8},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    source = {"name": "train.jsonl", "form": "standard", "pairs": 85}
    return {
        "format": 1,
        "config": config,
        "base": {"name": "base", "sha256": "b" * 64},
        "data": {
            "train": {"sources": [source], "pairs": 80, "left_out": {"too_long": 5}, "tokens_sha256": "t" * 64},
            "eval": {"sources": [], "pairs": 2, "left_out": {}, "tokens_sha256": "e" * 64},
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": "CPU x86_64",
    }


def _keys(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "/"): value for key, value in changes.items()}
