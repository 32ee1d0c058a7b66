"""What a reward model thinks of answers: its mean reward, and how often it prefers them to another model's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.evaluate.intervals import mean_score
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions, prompt_sha256
from lorafocal.evaluate.reward_model import TOKENS_PER_BATCH, RewardModel, open_reward_model
from lorafocal.generation.formats import Answers, read_answers
from lorafocal.model.load import base_fingerprint

Row = tuple[str, int]  # a prompt's digest, and which of its answers this is where a file asks it more than once


def evaluate_reward(
    answers: Path,
    *,
    model: str,
    against: Path | None = None,
    dtype: str | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    say: Callable[[str], None] = print,
) -> Result:
    """The rewards of the answers in a file of AlpacaEval's form, by the reward model `model` (folder or hub id).

    With `against`, another such file, also the share of prompts whose answer has the higher reward there of the two,
    ties half. Prompts of one file alone are counted and left out of it; so are answers that do not fit into the reward
    model with their prompt, which have no reward. Raises InputError, before the model is loaded where that can be
    known.
    """
    own, other = read_answers(answers), None if against is None else read_answers(against)
    name, opponent = own.generator, None if other is None else other.generator
    ours, theirs = _rows(own), {} if other is None else _rows(other)
    shared = [row for row in ours if row in theirs]
    if other is not None and not shared:
        raise InputError(f"{answers} and {against} answer no prompt in common, so there is nothing to compare")
    judge = open_reward_model(model, dtype=dtype)
    # Each text once: the rounding of two batches would else make a winner of two answers that are the same.
    texts = list(dict.fromkeys([*ours.values(), *(theirs[row] for row in shared)]))
    say(f"rewards by {judge.name} in {judge.dtype}, {judge.form}: {len(texts)} answers")
    rewards = dict(zip(texts, judge.rewards(texts, tokens_per_batch=tokens_per_batch), strict=True))
    scored = {row: rewards[text] for row, text in ours.items()}
    opposed = {row: rewards[theirs[row]] for row in shared}
    known = [reward for reward in scored.values() if reward is not None]
    if not known:
        raise InputError(f"no answer of {answers} fits into {judge.name} with its prompt: {judge.limit} tokens at most")
    scores = {"mean_reward": mean_score(known)}
    counts = {"answers": len(ours), "too_long": len(ours) - len(known), **_cut(own)}
    if other is not None:
        counts |= {"unmatched": len(ours) + len(theirs) - 2 * len(shared)}
        won = _preferences(scored, opposed)
        scores |= _paired_scores(won, [reward for reward in opposed.values() if reward is not None])
        counts |= {"compared": len(won), "won": won.count(1.0), "tied": won.count(0.5), "lost": won.count(0.0)}
    return Result(
        benchmark="reward_model",
        model=name,
        scores=scores,
        judge=judge.name,
        sampling=own.sampling,
        target=own.target,
        counts=counts,
        settings=_settings(judge, model, opponent),
        inputs=file_hashes(answers, *filter(None, [against])),
        versions=package_versions("torch", "transformers"),
        notes=tuple(_notes(judge, counts)),
        items=tuple(_item(row, scored, opposed) for row in ours),
    )


def _rows(answers: Answers) -> dict[Row, tuple[str, str]]:
    """Prompt and answer of every row, by its prompt."""
    seen: Counter[str] = Counter()
    rows = {}
    for number, row in enumerate(answers.rows, start=1):
        if row.instruction is None:
            raise InputError(
                f"{answers.file}, row {number} names its prompt by question_id alone, and a reward model reads its"
                " text: give answers in AlpacaEval's form (.json)"
            )
        digest = prompt_sha256(row.instruction)
        rows[digest, seen[digest]] = (row.instruction, row.output)
        seen[digest] += 1
    return rows


def _cut(answers: Answers) -> dict[str, int]:
    return {"length_limit": answers.counts["length_limit"]} if "length_limit" in answers.counts else {}


def _preferences(ours: Mapping[Row, float | None], theirs: Mapping[Row, float | None]) -> list[float]:
    """1 where our answer has the higher reward, 0.5 where both have the same, 0 otherwise; rows with both alone."""
    both = [(ours[row], other) for row, other in theirs.items()]
    return [0.5 if own == other else float(own > other) for own, other in both if own is not None and other is not None]


def _paired_scores(won: Sequence[float], opposed: Sequence[float]) -> dict[str, Score]:
    if not won:
        raise InputError("no prompt has both answers within the reward model's length, so there is nothing to compare")
    return {
        "win_rate": mean_score([100 * preference for preference in won]),
        "mean_reward_against": mean_score(opposed),
    }


def _settings(judge: RewardModel, model: str, opponent: str | None) -> dict[str, Any]:
    return {
        "reward_model": base_fingerprint(model),
        "dtype": judge.dtype,
        "form": judge.form,
        "longest_tokens": judge.limit,
        "against": opponent,
    }


def _notes(judge: RewardModel, counts: Mapping[str, int]) -> Iterator[str]:
    yield f"preferences of the reward model {judge.name}, not of AlpacaEval's or Arena-Hard's judge"
    if counts["too_long"]:
        yield (
            f"{counts['too_long']} of {counts['answers']} answers do not fit into {judge.limit} tokens with their"
            " prompt and have no reward: the numbers are those of the shorter ones"
        )
    if counts.get("unmatched"):
        yield f"{counts['unmatched']} answers are to prompts that the other file does not have, and are not compared"
    if counts.get("length_limit"):
        yield f"{counts['length_limit']} answers were cut at the limit of new tokens"


def _item(row: Row, ours: Mapping[Row, float | None], theirs: Mapping[Row, float | None]) -> dict[str, Any]:
    item: dict[str, Any] = {"prompt_sha256": row[0], "score": ours[row]}
    return item | {"score_against": theirs[row]} if row in theirs else item
