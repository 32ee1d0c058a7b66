"""Arena-Hard's win rate and its intervals, what the verdicts are, and which answer the judge likes for its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafocal.evaluate.arena_verdicts import LABELS, STRONG, Verdicts
from lorafocal.evaluate.bradley_terry import strengths, win_probability
from lorafocal.evaluate.intervals import Share, share
from lorafocal.evaluate.result import Score

PRINTED = 4  # decimals of a percentage; the fit is good for two more


def battles_resampled(verdicts: Sequence[Verdicts], *, rounds: int, seed: int) -> Score:
    """The win rate in percent, with the interval of arena-hard-auto v0.1: battles drawn with replacement.

    The draws are those of that project for a folder with this one file of judgments.
    """
    wins = [win for each in verdicts for win in each.battles]
    random, known = np.random.RandomState(seed), np.array(wins)
    drawn = [random.choice(len(wins), size=len(wins)) for _ in range(rounds)]
    return _score(wins, [(float(known[rows].sum()), len(wins)) for rows in drawn])


def questions_resampled(verdicts: Sequence[Verdicts], *, rounds: int, seed: int) -> Score:
    """The same win rate, with questions drawn: the two games of one and the battles of a strong verdict go together.

    The interval that a new set of questions calls for; drawing single battles makes it too narrow.
    """
    table = np.array([(sum(each.battles), len(each.battles)) for each in verdicts if each.battles])
    random = np.random.RandomState(seed)
    drawn = [table[random.choice(len(table), size=len(table))].sum(axis=0) for _ in range(rounds)]
    wins = [win for each in verdicts for win in each.battles]
    return _score(wins, [(float(won), float(battles)) for won, battles in drawn])


def first_preferred(verdicts: Sequence[Verdicts]) -> Share | None:
    """How often assistant A won among the games that were decided; half for a judge to whom order means nothing.

    None where no game was.
    """
    labels = [label for each in verdicts for label in each.labels]
    decided = [LABELS[label][0] == 1.0 for label in labels if label in LABELS and label != "A=B"]
    return share(decided) if decided else None


def count(verdicts: Sequence[Verdicts]) -> dict[str, int]:
    """What the verdicts are, for a result's `counts`."""
    labels = [label for each in verdicts for label in each.labels]
    decided = [wins for each in verdicts if None not in (wins := each.wins)]
    return {
        "questions": len(verdicts),
        "games": len(labels),
        "battles": sum(len(each.battles) for each in verdicts),
        "ties": labels.count("A=B"),
        "strong_verdicts": sum(label in LABELS and LABELS[label][1] == STRONG for label in labels),
        "games_without_label": labels.count(None),
        "games_with_unknown_label": sum(label is not None and label not in LABELS for label in labels),
        "questions_judged_in_one_order": sum(each.wins.count(None) == 1 for each in verdicts),
        "questions_without_verdict": sum(each.wins == (None, None) for each in verdicts),
        "questions_with_opposite_verdicts": sum({*wins} == {0.0, 1.0} for wins in decided),
    }


def _log_odds(won: float, battles: float) -> float:
    """The log-odds of the model's winning, its strength over the baseline's."""
    return float(strengths(np.array([[0.0, battles - won], [won, 0.0]]))[1])


def _percent(strength: float) -> float:
    return round(100 * win_probability(strength), PRINTED)


def _score(wins: Sequence[float], drawn: Sequence[tuple[float, float]]) -> Score:
    """The win rate of `wins`, its interval and standard error from what was `drawn`: (won, battles) a round."""
    again = [_log_odds(won, battles) for won, battles in drawn]
    low, high = (_percent(strength) for strength in np.percentile(again, (2.5, 97.5)))
    spread = float(np.std([_percent(strength) for strength in again], ddof=1))
    return Score(_percent(_log_odds(sum(wins), len(wins))), low, high, round(spread, PRINTED))
