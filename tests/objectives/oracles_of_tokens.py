"""Losses of weighted tokens as their papers print them, in decimal arithmetic: the oracles of test_token_weights.py.

Written from the cited equations, token by token, without a look at the library's weights. Weights take no gradient, so
they are read from `Answers.held` where a difference quotient moves a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext

from tests.objectives.oracles import DIGITS, ONE, STEP, cross_entropy

Row = tuple[Decimal, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Of each token its log-prob under policy, reference and guide, its id and its turn."""

    policy: Row
    reference: Row
    guide: Row
    ids: tuple[int, ...]
    turns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """A pair, and whose tokens were drawn of its longer answer; `held` is where weights are read."""

    won: Answer
    lost: Answer
    drawn: tuple[int, ...] = ()
    held: Answers | None = None

    @property
    def frozen(self) -> Answers:
        return self.held or self

    def moved(self, side: str, place: int, by: Decimal) -> Answers:
        """The pair with one token's log-prob under the policy raised, and its weights where they were."""
        answer: Answer = getattr(self, side)
        row = [*answer.policy]
        row[place] += by
        return replace(self, held=self.frozen, **{side: replace(answer, policy=tuple(row))})


def loss(pair: Answers, weights: tuple[Row, Row], beta: Decimal) -> Decimal:
    """-log sigma of beta times the difference of the weighted sums of log-ratios."""
    rewards = []
    for answer, row in zip((pair.won, pair.lost), weights, strict=True):
        ratios = [a - b for a, b in zip(answer.policy, answer.reference, strict=True)]
        rewards.append(beta * sum((w * d for w, d in zip(row, ratios, strict=True)), Decimal(0)))
    return cross_entropy(rewards[0] - rewards[1])


def ld_dpo(pair: Answers, beta: Decimal, alpha: Decimal) -> Decimal:
    """Liu et al. 2024 (arXiv 2409.06411): the likelihood of the first l tokens as it is, that of the rest to the
    power alpha, l being the shorter answer's length."""
    shared = min(len(pair.won.ids), len(pair.lost.ids))
    rows = [tuple(ONE if t < shared else alpha for t in range(len(side.ids))) for side in (pair.won, pair.lost)]
    return loss(pair, (rows[0], rows[1]), beta)


def sampo(pair: Answers, beta: Decimal) -> Decimal:
    """Lu et al. 2024 (arXiv 2406.10957): the sum over T_m = min(T_w, T_l) tokens of either answer."""
    fewest = min(len(pair.won.ids), len(pair.lost.ids))
    rows = []
    for side in (pair.won, pair.lost):
        kept = set(range(fewest)) if len(side.ids) == fewest else set(pair.drawn)
        assert len(kept) == fewest
        rows.append(tuple(Decimal(t in kept) for t in range(len(side.ids))))
    return loss(pair, (rows[0], rows[1]), beta)


def alike(won: tuple[int, ...], lost: tuple[int, ...]) -> tuple[set[int], set[int]]:
    """Places of either answer in the longest common block, and in those to the left and to the right of it: the
    matching of Ratcliff and Obershelp, which BMC's code uses. Of equal blocks the first, by the rejected answer."""
    found = [
        (-size, j, i)
        for i in range(len(won))
        for j in range(len(lost))
        for size in range(1, min(len(won) - i, len(lost) - j) + 1)
        if won[i : i + size] == lost[j : j + size]
    ]
    if not found:
        return set(), set()
    negative, j, i = min(found)
    size = -negative
    before, after = alike(won[:i], lost[:j]), alike(won[i + size :], lost[j + size :])
    return (
        before[0] | {*range(i, i + size)} | {i + size + place for place in after[0]},
        before[1] | {*range(j, j + size)} | {j + size + place for place in after[1]},
    )


def bmc(pair: Answers, beta: Decimal, delta: Decimal) -> Decimal:
    """Jiang et al. 2024 (arXiv 2408.07471): 1 + min(1/pi, delta) on tokens of the difference, 1 on the others."""
    at, same = pair.frozen, alike(pair.won.ids, pair.lost.ids)
    rows = [
        tuple(ONE if t in shared else ONE + min(ONE / a.exp(), delta) for t, a in enumerate(side.policy))
        for side, shared in zip((at.won, at.lost), same, strict=True)
    ]
    return loss(pair, (rows[0], rows[1]), beta)


def tgdpo(pair: Answers, beta: Decimal, alpha: Decimal) -> Decimal:
    """Zhu et al. 2025 (arXiv 2506.14574): 1 + alpha r of chosen tokens, 1 - alpha r of rejected ones, with
    r = beta log(pi_guide / pi_ref)."""
    rows = [
        tuple(ONE + sign * alpha * beta * (g - b) for g, b in zip(side.guide, side.reference, strict=True))
        for side, sign in ((pair.won, 1), (pair.lost, -1))
    ]
    return loss(pair, (rows[0], rows[1]), beta)


def dmpo(pair: Answers, beta: Decimal, turn_discount: Decimal) -> Decimal:
    """Shi et al. 2024 (arXiv 2406.14868): phi(t, T) = gamma^t (1 - gamma^(T-t)) / (1 - gamma^T), here as the sum
    gamma^t + ... + gamma^(T-1) over gamma^0 + ... + gamma^(T-1), which is also right at gamma 1."""
    rows = []
    for side in (pair.won, pair.lost):
        powers = [turn_discount**t for t in range(max(side.turns) + 1)]
        rows.append(tuple(sum(powers[turn:], Decimal(0)) / sum(powers, Decimal(0)) for turn in side.turns))
    return loss(pair, (rows[0], rows[1]), beta)


def dpo(pair: Answers, beta: Decimal) -> Decimal:
    ones = tuple(tuple(ONE for _ in side.ids) for side in (pair.won, pair.lost))
    return loss(pair, (ones[0], ones[1]), beta)


LOSSES: dict[str, Callable[..., Decimal]] = {
    "ld-dpo": ld_dpo,
    "sampo": sampo,
    "bmc": bmc,
    "tgdpo": tgdpo,
    "dmpo": dmpo,
    "dpo": dpo,
}


def value(name: str, pair: Answers, **parameters: float) -> Decimal:
    """The objective `name` of one pair, by its paper."""
    with localcontext(DIGITS):
        return LOSSES[name](pair, **{key: Decimal(number) for key, number in parameters.items()})


def slopes(name: str, pair: Answers, **parameters: float) -> list[Decimal]:
    """Of the loss in each token's log-prob under the policy, chosen ones first, by central differences."""
    with localcontext(DIGITS):
        found = []
        for side in ("won", "lost"):
            for place in range(len(getattr(pair, side).ids)):
                up, down = (value(name, pair.moved(side, place, by), **parameters) for by in (STEP, -STEP))
                found.append((up - down) / (2 * STEP))
        return found
