"""What a careless author would have written of references: see tests/guards.py."""

from __future__ import annotations

from typing import Any


def factors_averaged_apart(policy: Any, reference: Any, mixing: float) -> Any:
    """Row 1: A with A and B with B, which fits as long as their ranks do and is another model."""
    a, b = (mixing * own + (1 - mixing) * other for own, other in zip(policy[:2], reference[:2], strict=True))
    return type(reference)(a, b, reference.scale)
