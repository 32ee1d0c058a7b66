"""Two results over the same prompts: the paired difference with its interval, and whether the changes have a side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafocal.errors import InputError
from lorafocal.evaluate.intervals import RESAMPLES, mean_score, paired_interval, sign_test
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions, read_result

# What an item's verdict may be, and what it is multiplied by: shares become percent, scores keep their unit.
VERDICTS = {"right": 100.0, "preference": 100.0, "score": 1.0}
NAMES = ("question_id", "prompt_sha256", "answers_sha256")  # what an item says of what it is about
FEW = 20  # changed prompts, below which a bootstrap's interval is too narrow


@dataclass(frozen=True, slots=True)
class _Matched:
    """Verdicts of one kind on the prompts that both results judged, in the order of the first."""

    kind: str
    names: tuple[Mapping[str, Any], ...]
    first: np.ndarray
    second: np.ndarray
    counts: Mapping[str, int]


def evaluate_comparison(first: Path, second: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Result:
    """What the result file `second` has more than `first`, prompt by prompt; see `compare_results`."""
    one, other = read_result(first), read_result(second)
    try:
        return compare_results(one, other, inputs=file_hashes(first, second), resamples=resamples, seed=seed)
    except InputError as error:
        raise InputError(f"{first} and {second}: {error}") from error


def compare_results(
    first: Result,
    second: Result,
    *,
    inputs: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """The mean of `second` minus `first` over the prompts that both judged, matched by their digest.

    Scores: `difference` with its paired bootstrap interval, in points of a percent (in the score's own unit for
    scores); `sign_test_p`, exact and two-sided, over the prompts whose verdict changed; `first` and `second` on the
    matched prompts. For right and wrong, `difference_adjusted` has Bonett and Price's interval, which also holds where
    few prompts changed. A prompt that stands several times is matched in its order. Prompts that one result lacks, or
    has no verdict on, are counted and left out. Raises InputError where the two are not of one benchmark, have no
    common kind of verdict, or share no prompt.
    """
    if first.benchmark != second.benchmark:
        raise InputError(f"one is of {first.benchmark}, the other of {second.benchmark}: compare results of one kind")
    matched = _match(first, second)
    scale = VERDICTS[matched.kind]
    changes = matched.second - matched.first
    better, worse = int((changes > 0).sum()), int((changes < 0).sum())
    scores = {
        "difference": mean_score((scale * changes).tolist(), resamples=resamples, seed=seed),
        "sign_test_p": Score(sign_test(worse, better)),
        "first": Score(scale * float(matched.first.mean())),
        "second": Score(scale * float(matched.second.mean())),
    }
    if matched.kind == "right":
        before, after = (side.astype(bool).tolist() for side in (matched.first, matched.second))
        scores["difference_adjusted"] = Score(*(scale * bound for bound in paired_interval(before, after)))
    counts = {"better": better, "worse": worse, "unchanged": len(changes) - better - worse}
    return Result(
        benchmark="comparison",
        model=f"{second.model} against {first.model}",
        scores=scores,
        judge=first.judge if first.judge == second.judge else None,
        counts={"prompts": len(changes), **counts, **matched.counts},
        settings={
            "benchmark": first.benchmark,
            "verdict": matched.kind,
            "first": first.model,
            "second": second.model,
            "resamples": resamples,
            "seed": seed,
        },
        inputs=inputs or {},
        versions=package_versions(),
        notes=_notes(first, second, matched, better + worse),
        items=tuple(
            {**names, "score": scale * float(change)} for names, change in zip(matched.names, changes, strict=True)
        ),
    )


def _match(first: Result, second: Result) -> _Matched:
    for result in (first, second):
        if not result.items:
            raise InputError(f"the result of {result.model} has no items, one a prompt: it cannot be paired")
    kind = next((kind for kind in VERDICTS if kind in first.items[0] and kind in second.items[0]), None)
    if kind is None:
        raise InputError(f"their items have no {', '.join(VERDICTS)} in common")
    ours, theirs = _by_prompt(first, kind), _by_prompt(second, kind)
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise InputError("they share no prompt: evaluate both models on one file of prompts")
    judged = [key for key in shared if ours[key][kind] is not None and theirs[key][kind] is not None]
    if not judged:
        raise InputError(f"none of the {len(shared)} prompts they share has a verdict in both")
    counts = {
        "only_first": len(ours) - len(shared),
        "only_second": len(theirs) - len(shared),
        "without_verdict": len(shared) - len(judged),
    }
    names = tuple({name: ours[key][name] for name in NAMES if name in ours[key]} for key in judged)
    one, other = (np.asarray([float(side[key][kind]) for key in judged]) for side in (ours, theirs))
    return _Matched(kind, names, one, other, counts)


def _by_prompt(result: Result, kind: str) -> dict[tuple[Hashable, ...], Mapping[str, Any]]:
    """Items by their question or prompt (and pair of answers, where they name one) and how often that stood before."""
    found: dict[tuple[Hashable, ...], Mapping[str, Any]] = {}
    seen: Counter[tuple[Hashable, ...]] = Counter()
    for number, item in enumerate(result.items):
        prompt = item.get("question_id", item.get("prompt_sha256"))
        if prompt is None or kind not in item:
            raise InputError(f"items[{number}] of {result.model} lacks prompt_sha256 or {kind}: evaluate it again")
        if item[kind] is not None and not isinstance(item[kind], bool | int | float):
            raise InputError(f"items[{number}] of {result.model}: {kind} is {item[kind]!r}, not a number or null")
        name = (prompt, item.get("answers_sha256"))
        seen[name] += 1
        found[*name, seen[name]] = item
    return found


def _notes(first: Result, second: Result, matched: _Matched, changed: int) -> tuple[str, ...]:
    notes = [f"the difference is {second.model} minus {first.model}"]
    if left := matched.counts["only_first"] + matched.counts["only_second"]:
        notes.append(f"{left} prompts stand in one of the two alone and are left out")
    if without := matched.counts["without_verdict"]:
        notes.append(f"{without} shared prompts have no verdict in one of the two and are left out")
    if first.judge != second.judge:
        notes.append(f"the judges differ ({first.judge} and {second.judge}), and so may what they call better")
    if keys := _differences(first.sampling, second.sampling):
        notes.append(f"the answers were drawn otherwise: {', '.join(keys)} differ")
    if keys := _differences(first.settings, second.settings):
        notes.append(f"the two were evaluated otherwise: {', '.join(keys)} differ")
    if keys := _differences(first.versions, second.versions):
        notes.append(f"the versions of {', '.join(keys)} differ")
    if changed < FEW:
        notes.append(
            f"only {changed} prompts changed: the bootstrap's interval is then too narrow; take the sign test's word"
        )
    return tuple(notes)


def _differences(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    """Names of what is not alike; nothing where one side is not known."""
    if one is None or other is None:
        return []
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
