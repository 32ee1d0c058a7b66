"""Did I reproduce it? Whether a run ranks held-out pairs as a released checkpoint does, by their implicit rewards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafocal import recipes
from lorafocal.data.held_out import HELD_OUT_FILE, write_held_out
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.correlation import RESAMPLES, pearson, spearman, spread_ratio, with_interval
from lorafocal.evaluate.intervals import share
from lorafocal.evaluate.result import Result, file_hashes, package_versions, prompt_sha256
from lorafocal.evaluate.score import ScoredPairs, is_its_own_reference, reference_name, score_pairs
from lorafocal.generation.subject import Subject, find_subject
from lorafocal.model.load import check_same_tokens

FEWEST = 10  # pairs; below, an interval spans most of what a correlation can be
NO_BETA = 1.0  # margins in nats: a factor changes no correlation


def evaluate_fingerprint(
    target: str | Path,
    *,
    released: str,
    pairs: Path,
    base: str | None = None,
    target_reference: str | None = None,
    released_reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Result:
    """Correlate the margins of `target` (run, adapter, model) and of `released` on `pairs`, each against its reference.

    A margin is the log-ratio to the reference of the chosen answer minus that of the rejected one, in nats, so that
    neither beta matters. Both models read the same tokens, those of `target`. An adapter's reference is its base, the
    adapter off. A whole model's is named: `released_reference`, which for a checkpoint of configs/paper/released.yaml
    defaults to what that was trained from; `target_reference` likewise.

    Scores: `pearson` and `spearman` with bootstrap intervals; `spread_ratio`, how far the margins of `target` reach by
    those of `released`; `same_sign`, `accuracy` and `accuracy_released` in percent. Raises InputError, before weights
    are loaded where that can be known, and for fewer than 10 pairs.
    """
    ours, theirs = find_subject(target, base=base), find_subject(released)
    check_same_tokens(ours.tokenizer, theirs.tokenizer, released)
    references = (
        _reference(ours, target_reference, "--reference"),
        _reference(theirs, released_reference, "--released-reference"),
    )
    say(f"{ours.name} against {references[0] or 'its base'}")
    enough = partial(_check_enough, pairs)
    own = score_pairs(target, pairs, base=base, reference=references[0], beta=NO_BETA, check=enough)
    say(f"{theirs.name} against {references[1] or 'its base'}")
    other = _on_the_same_tokens(released, own.pairs, references[1])
    margins, released_margins = _varying(own), _varying(other)
    drawing: dict[str, Any] = {"resamples": resamples, "seed": seed}
    statistics = {"pearson": pearson, "spearman": spearman, "spread_ratio": spread_ratio}
    agreement = [(a > 0) == (b > 0) for a, b in zip(margins, released_margins, strict=True)]
    return Result(
        benchmark="fingerprint",
        model=ours.name,
        scores={
            **{name: with_interval(each, margins, released_margins, **drawing) for name, each in statistics.items()},
            "same_sign": share(agreement).percent,
            "accuracy": share([margin > 0 for margin in margins]).percent,
            "accuracy_released": share([margin > 0 for margin in released_margins]).percent,
        },
        target=ours.describe(),
        counts={"pairs": len(own.pairs), "left_out": own.report.left_out},
        settings={
            "released": theirs.describe(),
            "reference": reference_name(references[0]),
            "released_reference": reference_name(references[1]),
            **drawing,
        },
        inputs=file_hashes(pairs),
        versions=package_versions("torch", "transformers"),
        notes=tuple(_notes(ours, theirs, own)),
        items=tuple(map(partial(_item, ours.tokenizer), own.pairs, margins, released_margins)),
    )


def _check_enough(file: Path, pairs: Sequence[TokenizedPair]) -> None:
    if len(pairs) < FEWEST:
        raise InputError(f"{file} gives {len(pairs)} pairs; a correlation needs {FEWEST}, and hundreds to say much")


def _reference(subject: Subject, given: str | None, option: str) -> str | None:
    """What a subject's rewards are relative to; None for an adapter's own base."""
    if given is not None:
        return given
    if is_its_own_reference(subject):
        return None
    if subject.saved is not None:
        raise InputError(f"{subject.name} was not trained against its own base: name its reference by {option}")
    known = next((row.trained_from for row in recipes.released() if row.model == subject.place), None)
    if known is None:
        raise InputError(f"{subject.name} is a whole model: name the one that it was trained from by {option}")
    return known


def _on_the_same_tokens(released: str, pairs: list[TokenizedPair], reference: str | None) -> ScoredPairs:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / HELD_OUT_FILE
        write_held_out(file, pairs)
        return score_pairs(released, file, reference=reference, beta=NO_BETA)


def _varying(scored: ScoredPairs) -> list[float]:
    """The margins. Raises InputError where all are alike, as those of a model that is its reference."""
    margins = scored.report.margins
    if min(margins) == max(margins):
        raise InputError(
            f"every margin of {scored.report.target} is {margins[0]:g}: it is its own reference, or was not trained"
        )
    return margins


def _item(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, margin: float, released: float) -> dict[str, Any]:
    prompt = str(tokenizer.decode(list(pair.prompt_ids)))
    return {"prompt_sha256": prompt_sha256(prompt), "margin": margin, "margin_released": released}


def _notes(ours: Subject, theirs: Subject, own: ScoredPairs) -> Iterator[str]:
    yield (
        "a high correlation says: the same base, kind of data and strength of training; it does not tell objectives"
        " apart that move margins alike, as FocalPO and DPO do while margins are small"
    )
    if own.report.left_out:
        yield f"{own.report.left_out} rows of the file gave no pair and are left out"
    if ours.tokenizer.chat_template != theirs.tokenizer.chat_template:
        yield f"{theirs.name} has another chat template; both read the pairs as {ours.name} does"
    if ours.dtype != theirs.dtype:
        yield f"{ours.name} computes in {ours.dtype}, {theirs.name} in {theirs.dtype}"
    if ours.saved is not None and ours.saved.quantization is not None:
        yield f"the base of {ours.name} is quantised to {ours.saved.quantization}, as in training"
