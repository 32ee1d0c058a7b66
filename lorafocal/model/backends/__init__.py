"""Libraries besides transformers that a base can be loaded through: one file each, and nothing else names its library.

A backend has two functions: `start()`, to be called before transformers is imported, and `load(...)`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def named(backend: str) -> ModuleType:
    """The module of a backend by its word in a config (`model.backend`)."""
    return import_module(f"{__name__}.{backend}")
