"""What a run leaves in its folder, by name; and its manifest, as cards and reports read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_DIR, MODEL_DIR = "adapter", "model"  # what it makes, by adapters or at full parameters
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, in the folder of any adapter
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # the folder of one, by the steps before it
SWEEP_FILE = "sweep.json"  # in a folder of runs that belong together, no run's own
STAGES_FILE = "stages.json"  # the same of stages


def run_of(folder: Path) -> Path:
    """Where the files of the run lie that left what is in `folder`: beside it, or beside its checkpoint."""
    above = folder.resolve().parent
    return above.parent if CHECKPOINT.fullmatch(above.name) else above


def made_by(adapter: object) -> str:
    """What a run makes, by its config's `adapter`: the name of the folder."""
    return MODEL_DIR if adapter is None else ADAPTER_DIR


def check_there(adapter: Path) -> None:
    """Raises InputError where the folder of an adapter is none."""
    if not adapter.is_dir():
        raise InputError(f"{adapter}: there is no such folder; a run keeps its adapter in RUN/{ADAPTER_DIR}")


def read_manifest(run: Path) -> Mapping[str, Any]:
    """What a run says of itself; nothing where that cannot be read."""
    try:
        manifest = json.loads((run / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def last_rewards(lines: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of the lines of a run's metrics: the rewards of the last evaluation, which is that of what it made."""
    last: Mapping[str, float] = next((line for line in reversed([*lines]) if "eval_loss" in line), {})
    return {key: value for key, value in last.items() if key.startswith("eval_rewards/")}
