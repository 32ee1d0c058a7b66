"""What a careless author would have written in merges, in chat and in what is published; more of `tests.careless`.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any


def one_cache_for_all_streams(original: Any) -> Any:
    """Row 6: what was computed with the adapter on is also what the next token with it off attends to."""
    shared: dict[str, Any] = {}

    def next_logits(stream: Any) -> Any:
        if stream.ids:
            stream._cache = shared["cache"]
        logits = original(stream)
        shared["cache"] = stream._cache
        return logits

    return next_logits


def switched_for_the_prompt_only(turns: Any) -> Any:
    """Row 6: the adapter is off while the prompt is read, and on again when the answer is drawn."""
    for stream, state in turns:
        with state():
            stream.step()
    while not all(stream.done for stream, _ in turns):
        for stream, _ in turns:
            if not stream.done:
                stream.step()
                yield


def whatever_lies_there(_: Any) -> Any:
    """Row S14: the folder as it is, as `upload_folder` would take it."""

    def every_file(folder: Path, *, with_pairs: bool = False) -> tuple[dict[str, Path], list[str]]:
        return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}, []

    return every_file


def merged_into_four_bits(original: Any) -> Any:
    """Row 41: what is merged goes back into the codes it came from, which round most of the change away."""

    def rounded_change(name: Any, weight: Any, change: Any, dtype: Any) -> Any:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        stored, survival = original(name, weight, change, dtype)
        return dequantize_4bit(*quantize_4bit(stored.contiguous(), quant_type="nf4")), survival

    return rounded_change


def halves_of_a_change(original: Any) -> Any:
    """Row 53: a layer that lacks a half of its change is passed over."""

    def low_rank(where: str, layer: str, config: Any, left: Any, *, transposed: bool) -> Any:
        from lorafocal.errors import InputError

        try:
            return original(where, layer, config, left, transposed=transposed)
        except InputError:
            return None

    return low_rank


def survival_of_the_norm(original: Any) -> Any:
    """Row 43: the length of the stored change beside the learned one, which rounding noise makes longer."""

    def measure_survival(layer: str, weight: Any, delta: Any, stored: Any) -> Any:
        found = original(layer, weight, delta, stored)
        change = (stored.float() - weight.float()).norm().item()
        return type(found)(layer, change / max(found.delta_norm, 1e-30), found.error, found.delta_norm)

    return measure_survival


def weights_on_both_factors(original: Any) -> Any:
    """Row 5: the weight of an adapter on A and B apart acts squared, so that -1 adds what it should take away."""

    def concatenated(parts: Any, weights: Any) -> Any:
        weighted = [
            {name: replace(one, a=one.a * weight, b=one.b * weight) for name, one in part.items()}
            for part, weight in zip(parts, weights, strict=True)
        ]
        return original(weighted, [1.0] * len(weights))

    return concatenated
