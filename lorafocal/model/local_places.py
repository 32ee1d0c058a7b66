"""Takes places of a machine out of the settings that are written beside a model's weights.

transformers keeps keys that it does not know, and a base may have any: notes, the folders that it was made from.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_PLACE = re.compile(r"\s*(?:/|~[\w.-]*(?:/|\s*$)|[A-Za-z]:[\\/]|\\\\|file:/)")


def forget_places(folder: Path, config: PretrainedConfig) -> tuple[str, ...]:
    """Drop from the settings in `folder` what their class does not know and what names a place; notes of what it was.

    `config` is what config.json was written from. A file without such keys stays as it is, byte for byte.
    """
    notes = []
    for name, settings in ((CONFIG, config), (GENERATION_CONFIG, GenerationConfig())):
        values = _read(folder / name)
        dropped = _drop(values, settings)
        if dropped:
            text = json.dumps(values, indent=2, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")
            notes.append(f"Left out of the base's {name}, as places on a machine: {', '.join(dropped)}.")
    return tuple(notes)


def _read(file: Path) -> dict[str, Any]:
    """Nothing where there is no file, or one that holds no settings, as transformers has it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _drop(values: dict[str, Any], settings: PretrainedConfig | GenerationConfig, prefix: str = "") -> list[str]:
    """Take the keys out of `values`; their names, with those of the parts that they stood in."""
    dropped, known = [], _known(settings)
    for key, value in list(values.items()):
        part = vars(settings).get(key)  # asked by its name, one that differs between layers would raise
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            dropped += _drop(value, part, f"{prefix}{key}.")
        elif key not in known and _names_place(value):
            del values[key]
            dropped.append(prefix + key)
    return dropped


def _known(settings: PretrainedConfig | GenerationConfig) -> set[str]:
    """The settings that the class itself has; not `_name_or_path` and its like, which say where it came from."""
    usual = GenerationConfig() if isinstance(settings, GenerationConfig) else PretrainedConfig()
    names = {*vars(usual), *inspect.signature(type(settings)).parameters}
    return {name for name in names if not name.startswith("_")}


def _names_place(value: Any) -> bool:
    """Whether a value is, or holds, an absolute path or one from somebody's home."""
    if isinstance(value, dict):
        return any(_names_place(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_names_place(inner) for inner in value)
    return isinstance(value, str) and _PLACE.match(value) is not None
