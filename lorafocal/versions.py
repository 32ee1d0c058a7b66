"""Our version, and those of the libraries that are installed, as runs and results record them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is not. Ours is known in a bare source tree too."""
    if package == "lorafocal":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
