"""`lorafocal sweep`: a run for every point of a grid, and the best of them on held-out pairs."""

from lorafocal.sweep.runs import sweep

__all__ = ["sweep"]
