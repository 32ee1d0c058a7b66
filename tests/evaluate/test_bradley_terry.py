"""Bradley-Terry: closed forms, the likelihood's own equation, recovered strengths, and what has no answer."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.bradley_terry import strengths, win_probability


def table(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def tournament(true: np.ndarray, games: int, seed: int) -> np.ndarray:
    """Wins where each pair plays `games` times and i beats j with probability sigmoid(true[i] - true[j])."""
    rng, wins = np.random.default_rng(seed), np.zeros((len(true), len(true)))
    for i in range(len(true)):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + math.exp(true[j] - true[i])))
            wins[j, i] = games - wins[i, j]
    return wins


@pytest.mark.parametrize(("won", "lost"), [(7, 3), (1, 1), (0.5, 999.5), (250.5, 749.5), (3, 1e-3)])
def test_of_two_players_the_win_rate_is_the_share_of_the_wins(won: float, lost: float) -> None:
    anchor, strength = strengths(table([0, lost], [won, 0]))

    assert anchor == 0
    assert strength == pytest.approx(math.log(won / lost), abs=1e-4)
    assert win_probability(strength) == pytest.approx(won / (won + lost), abs=1e-7)


@pytest.mark.parametrize(("wins", "expected"), [([[0, 0], [40, 0]], 1.0), ([[0, 40], [0, 0]], 0.0)])
def test_who_always_wins_has_a_win_rate_of_1_and_who_never_does_of_0(wins: list[list[float]], expected: float) -> None:
    assert win_probability(strengths(table(*wins))[1]) == pytest.approx(expected, abs=1e-7)


def test_only_the_proportions_count() -> None:
    wins = tournament(np.array([0.0, 0.4, -0.7]), 30, seed=1)
    assert strengths(1000 * wins) == pytest.approx(strengths(wins), abs=1e-6)


def test_each_player_is_expected_to_win_as_often_as_it_did() -> None:
    """The equation of the likelihood's maximum, also with ties and pairs that never met."""
    wins = table([0, 3, 2.5, 0], [5, 0, 0, 1], [1.5, 0, 0, 6], [0, 4, 2, 0])
    fitted = strengths(wins)
    chances = 1 / (1 + np.exp(fitted[None, :] - fitted[:, None]))
    expected = ((wins + wins.T) * chances).sum(axis=1)
    assert expected == pytest.approx(wins.sum(axis=1), abs=1e-4)


def test_strengths_of_several_players_are_recovered_within_their_interval() -> None:
    """Within 4 standard errors, from the Fisher information, at games enough for these to be small."""
    true = np.array([0.0, 0.5, -1.0, 2.0, 0.1])
    games = 5000
    chances = 1 / (1 + np.exp(true[None, :] - true[:, None]))
    weights = games * chances * (1 - chances)
    np.fill_diagonal(weights, 0)
    information = np.diag(weights.sum(axis=1)) - weights
    errors = np.sqrt(np.diag(np.linalg.inv(information[1:, 1:])))

    found = strengths(tournament(true, games, seed=0))

    assert errors.max() < 0.05
    assert (np.abs(found - true)[1:] < 4 * errors).all()


def test_the_anchor_only_shifts_the_scale() -> None:
    wins = tournament(np.array([0.0, 0.5, -1.0]), 100, seed=3)
    order = [2, 0, 1]
    turned = strengths(wins[np.ix_(order, order)])
    assert turned[[1, 2, 0]] - turned[1] == pytest.approx(strengths(wins), abs=1e-4)


def test_models_that_met_the_baseline_alone_do_not_touch_each_other() -> None:
    """So a win rate against the baseline is the same, whoever else is in the folder."""
    first, second = table([0, 30], [10, 0]), table([0, 5], [20.5, 0])
    together = np.zeros((3, 3))
    together[np.ix_([0, 1], [0, 1])] = first
    together[np.ix_([0, 2], [0, 2])] += second
    assert strengths(together)[1] == pytest.approx(strengths(first)[1], abs=1e-4)
    assert strengths(together)[2] == pytest.approx(strengths(second)[1], abs=1e-4)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (table([0, 0], [0, 0]), "never all compared"),
        (table([0, 1, 0], [1, 0, 0], [0, 0, 0]), "never all compared"),
        (table([0, -1], [1, 0]), "finite numbers of at least 0"),
        (table([0, math.nan], [1, 0]), "finite numbers of at least 0"),
        (np.zeros((2, 3)), "square table"),
    ],
)
def test_what_has_no_strengths_is_refused(wins: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        strengths(wins)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install 'lorafocal\[eval\]'"):
        strengths(table([0, 1], [1, 0]))
