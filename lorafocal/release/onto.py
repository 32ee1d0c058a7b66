"""Which weights an adapter is merged into: those that training saw, or the originals that they were quantised from.

Nobody can say beforehand which of the two ends nearer to the adapter, so both are written and measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafocal.errors import InputError
from lorafocal.model.quantized import prequantized
from lorafocal.model.saved import SavedAdapter, held, read_config
from lorafocal.release.gate import GateReport
from lorafocal.release.measure import Merged
from lorafocal.release.weights import Written

AUTO, TRAINED, ORIGINAL = "auto", "trained", "original"
CHOICES = (AUTO, TRAINED, ORIGINAL)


@dataclass(frozen=True, slots=True)
class Measured:
    """A merge that was written to `folder` and held against the live adapter; `onto` is TRAINED or ORIGINAL."""

    onto: str
    folder: Path
    written: Written
    merged: Merged
    gate: GateReport


def bases_to_try(saved: SavedAdapter, onto: str, original: str | None) -> tuple[str, ...]:
    """The bases that `onto` ("auto", "trained" or "original") stands for with this adapter.

    Of a float base there is one. A base that is stored quantised has an original only where `original` names it.
    Raises InputError for a choice that the adapter does not have.
    """
    if onto not in CHOICES:
        raise InputError(f"--onto {onto!r}: choose one of {', '.join(CHOICES)}.")
    if original is not None and onto == TRAINED:
        raise InputError("--original names floats that --onto trained would not use: leave one of the two out.")
    if saved.quantization is None:
        if onto == ORIGINAL or original is not None:
            raise InputError(
                f"{saved.folder} was trained on {held(None)}, so there is one base to merge it into: leave --onto and"
                " --original out."
            )
        return (TRAINED,)
    stored = prequantized(read_config(saved.base, saved.revision), saved.base)
    if original is None:
        if stored is None:
            return (TRAINED, ORIGINAL) if onto == AUTO else (onto,)
        if onto == ORIGINAL:
            raise InputError(
                f"{saved.base} is stored as {stored}, so the floats that it was made of are not there: name them with"
                " --original MODEL, or merge with --onto trained."
            )
        return (TRAINED,)
    _check_original(saved, original, stored)
    return (TRAINED, ORIGINAL) if onto == AUTO else (ORIGINAL,)


def _check_original(saved: SavedAdapter, original: str, stored: str | None) -> None:
    if stored is None:
        raise InputError(
            f"{saved.base} is stored in floats, which were quantised on loading: it is its own original. Leave"
            " --original out."
        )
    if (found := prequantized(read_config(original), original)) is not None:
        raise InputError(f"--original {original}: it is stored as {found} too. Name the float model.")


def least_drift(candidates: Sequence[Measured]) -> Measured:
    """The candidate nearest to the adapter; what training saw where they are equal, which comes first."""
    return min(candidates, key=lambda one: math.inf if math.isnan(one.gate.drift_rms) else one.gate.drift_rms)


def why_kept(kept: Measured, candidates: Sequence[Measured], saved: SavedAdapter) -> tuple[str, ...]:
    """What a reader of the report must know of the base that was merged into; nothing for a float one."""
    if saved.quantization is None:
        return ()
    trained_on = f"The adapter was trained on the base quantised to {saved.quantization}, "
    if kept.onto == TRAINED:
        note = "so it was merged into those weights de-quantised again (what training saw), not into the original ones."
    else:
        note = "but it was merged into the original floats."
    if len(candidates) > 1:
        drifts = " and ".join(f"{one.gate.drift_rms:.3g} nats onto the {one.onto} base" for one in candidates)
        note += f" Both were measured, and the one with less drift was kept: {drifts}."
    if saved.quantization == "int8":
        note += (
            " In training on a GPU an int8 layer also rounds its inputs to 8 bits, which no merged model does: the"
            " drift counts that."
        )
    return (trained_on + note,)
