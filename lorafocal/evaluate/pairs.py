"""How well a model's implicit rewards rank pairs of answers, and whether its p means what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.calibration import BINS, Calibration, calibrate
from lorafocal.evaluate.intervals import RESAMPLES, mean_score, share
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions, prompt_sha256
from lorafocal.evaluate.score import PairScore, ScoredPairs, check_rewards, reference_name, score_pairs

VERDICTS, SHARES = "verdicts", "shares"  # what the labels of pairs are
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WHOLE = 1e-3  # how far two shares of annotators may be from 1 in sum, as printed numbers are rounded


def evaluate_pairs(
    target: Path | str,
    pairs: Path,
    *,
    base: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    labels: str = VERDICTS,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """Rank the pairs of a file by a model's implicit rewards: accuracy, margins, calibration of p = sigmoid(margin).

    `target`, `pairs`, `base`, `reference` and `beta` are `score_file`'s. `labels` "verdicts" takes every chosen answer
    for the better one; "shares" reads `score_chosen` and `score_rejected` of each row as the shares of annotators that
    prefer either, which sum to 1. Raises InputError where there are no margins: without a reference or a beta.
    """
    if labels not in (VERDICTS, SHARES):
        raise InputError(f"labels is {VERDICTS} or {SHARES}, not {labels!r}")
    check_rewards(target, base=base, reference=reference, beta=beta)
    check = _shares if labels == SHARES else len
    scored = score_pairs(target, pairs, base=base, reference=reference, beta=beta, check=check)
    return pairs_result(
        scored,
        settings={
            "reference": reference_name(reference),
            "labels": labels,
            "bins": bins,
            "resamples": resamples,
            "seed": seed,
        },
        inputs=file_hashes(pairs),
    )


def pairs_result(scored: ScoredPairs, *, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Result:
    """The numbers of scored pairs; `settings` are those of `evaluate_pairs`.

    Scores: `accuracy`, and `longer_answer_accuracy`, what "the longer one is better" ranks right of the pairs whose
    answers differ in tokens, in percent; `accuracy_longer_chosen` and `accuracy_shorter_chosen`, the model's own on the
    pairs of either kind; `margin` in the rewards' unit; `calibration_error` and `brier` in [0, 1], `log_loss` in nats.
    `calibration_error_by_chance` is what a perfectly calibrated model would show with these probabilities and this many
    pairs. Ties (a margin of exactly 0) are not right, as in training's log, and counted.
    """
    report, margins = scored.report, scored.report.margins
    drawing = {"resamples": settings["resamples"], "seed": settings["seed"]}
    labels = _shares(scored.pairs) if settings["labels"] == SHARES else None
    calibration = calibrate(margins, labels, bins=settings["bins"], seed=settings["seed"])
    ranking, counts = _ranking(report.scores)
    return Result(
        benchmark="pairs",
        model=report.target,
        target=scored.subject.describe(),
        scores={**ranking, "margin": mean_score(margins, **drawing), **_calibration_scores(calibration, drawing)},
        counts={**counts, "left_out": report.left_out},
        settings={"beta": report.beta, **settings},
        inputs=inputs,
        versions=package_versions("torch", "transformers"),
        notes=_notes(counts, report.left_out),
        items=tuple(map(partial(_item, scored.subject.tokenizer), scored.pairs, margins)),
        details={
            "margins": [{"quantile": q, "margin": float(np.quantile(margins, q))} for q in QUANTILES],
            "reliability": calibration.reliability(),
        },
    )


def _ranking(scores: Sequence[PairScore]) -> tuple[dict[str, Score], dict[str, int]]:
    """Accuracies in percent with Wilson's intervals, and what was counted."""
    right = [(score.margin or 0.0) > 0 for score in scores]
    longer = [score.chosen_tokens - score.rejected_tokens for score in scores]
    found = {
        "accuracy": right,
        "longer_answer_accuracy": [difference > 0 for difference in longer if difference != 0],
        "accuracy_longer_chosen": [was for was, difference in zip(right, longer, strict=True) if difference > 0],
        "accuracy_shorter_chosen": [was for was, difference in zip(right, longer, strict=True) if difference < 0],
    }
    counts = {
        "pairs": len(scores),
        "ties": sum(score.margin == 0 for score in scores),
        "longer_chosen": len(found["accuracy_longer_chosen"]),
        "shorter_chosen": len(found["accuracy_shorter_chosen"]),
    }
    return {name: share(verdicts).percent for name, verdicts in found.items() if verdicts}, counts


def _calibration_scores(calibration: Calibration, drawing: Mapping[str, int]) -> dict[str, Score]:
    scores = {"calibration_error": Score(calibration.error)}
    if calibration.chance_errors is not None:
        low, high = np.quantile(calibration.chance_errors, (0.025, 0.975)).tolist()
        scores["calibration_error_by_chance"] = Score(float(np.mean(calibration.chance_errors)), low, high)
    return scores | {
        "brier": mean_score(calibration.brier, **drawing),
        "log_loss": mean_score(calibration.log_loss, **drawing),
    }


def _shares(pairs: Sequence[TokenizedPair]) -> list[float]:
    """The share of annotators that prefer the chosen answer, pair by pair."""
    for pair in pairs:
        chosen, rejected = pair.score_chosen, pair.score_rejected
        if chosen is None or rejected is None:
            raise InputError(f"pair {pair.id} has no score_chosen and score_rejected, which --labels {SHARES} reads")
        if not (0 <= chosen <= 1 and 0 <= rejected <= 1 and abs(chosen + rejected - 1) <= WHOLE):
            raise InputError(
                f"pair {pair.id}: score_chosen {chosen:g} and score_rejected {rejected:g} are no shares of annotators,"
                f" which are in [0, 1] and sum to 1; other scores say nothing of p: --labels {VERDICTS}"
            )
    return [float(pair.score_chosen or 0.0) for pair in pairs]


def _item(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, margin: float) -> dict[str, Any]:
    """A pair by digests of its prompt, as the tokenizer writes it, and of its two answers; and its verdict."""
    sides = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    prompt, *answers = (prompt_sha256(str(tokenizer.decode(list(ids)))) for ids in sides)
    return {
        "prompt_sha256": prompt,
        "answers_sha256": prompt_sha256(" ".join(answers)),
        "right": margin > 0,
        "margin": margin,
    }


def _notes(counts: Mapping[str, int], left_out: int) -> tuple[str, ...]:
    notes = ["items name prompts by the digest of their text as the tokenizer writes it, the chat template included"]
    if left_out:
        notes.append(f"{left_out} rows of the file gave no pair and are left out")
    if ties := counts["ties"]:
        notes.append(f"{ties} of {counts['pairs']} margins are exactly 0, which counts as not right")
    return tuple(notes)
