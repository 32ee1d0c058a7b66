"""Preference tuning with FocalPO, on adapters or on every parameter. Names load on first use: the import is instant."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorafocal.versions import __version__

if TYPE_CHECKING:
    from lorafocal.config import Config, load_config
    from lorafocal.errors import InputError
    from lorafocal.model.load import load_base
    from lorafocal.objectives import dpo, focalpo
    from lorafocal.trainer import FocalPOConfig, FocalPOTrainer

_HOME = {
    "Config": "config",
    "FocalPOConfig": "trainer",
    "FocalPOTrainer": "trainer",
    "InputError": "errors",
    "dpo": "objectives",
    "focalpo": "objectives",
    "load_base": "model.load",
    "load_config": "config",
}

__all__ = [
    "Config",
    "FocalPOConfig",
    "FocalPOTrainer",
    "InputError",
    "__version__",
    "dpo",
    "focalpo",
    "load_base",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
