"""Losses of whole distributions as their papers print them, in decimal arithmetic: the oracles of test_vocabulary.py.

Written token by token from the cited equations and read off the probabilities of a small vocabulary. What takes no
gradient is read from `Answers.held`, so that a difference quotient leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext

from tests.objectives.oracles import DIGITS, ONE, STEP, cross_entropy

Rows = tuple[tuple[Decimal, ...], ...]  # of each token the logits of the vocabulary


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits of both models at each token, and the tokens."""

    policy: Rows
    reference: Rows
    ids: tuple[int, ...]

    @property
    def ratios(self) -> list[Decimal]:
        """log pi - log pi_ref of each token."""
        policy, reference = (map(log_softmax, rows) for rows in (self.policy, self.reference))
        return [now[y] - then[y] for now, then, y in zip(policy, reference, self.ids, strict=True)]

    @property
    def logp(self) -> Decimal:
        return sum((log_softmax(row)[y] for row, y in zip(self.policy, self.ids, strict=True)), Decimal(0))

    @property
    def divergence(self) -> Decimal:
        """D_SeqKL(x, y; pi_ref || pi) of arXiv 2404.11999: sum over tokens of KL(pi_ref || pi) at each prefix."""
        total = Decimal(0)
        for now, then in zip(self.policy, self.reference, strict=True):
            log_now, log_then = log_softmax(now), log_softmax(then)
            total += sum((r.exp() * (r - p) for p, r in zip(log_now, log_then, strict=True)), Decimal(0))
        return total


@dataclass(frozen=True, slots=True)
class Answers:
    won: Answer
    lost: Answer
    held: Answers | None = None

    @property
    def frozen(self) -> Answers:
        return self.held or self

    def moved(self, side: str, token: int, word: int, by: Decimal) -> Answers:
        """One of the policy's logits raised, and what takes no gradient where it was."""
        answer: Answer = getattr(self, side)
        rows = [list(row) for row in answer.policy]
        rows[token][word] += by
        return replace(self, held=self.frozen, **{side: replace(answer, policy=tuple(map(tuple, rows)))})


def log_softmax(row: tuple[Decimal, ...]) -> list[Decimal]:
    total = sum((x.exp() for x in row), Decimal(0)).ln()
    return [x - total for x in row]


def tdpo1(pair: Answers, beta: Decimal) -> Decimal:
    """Zeng et al. 2024 (arXiv 2404.11999): log sigma(u - delta), u DPO's margin, delta = beta K_l - beta K_w."""
    u = beta * (sum(pair.won.ratios) - sum(pair.lost.ratios))
    return cross_entropy(u - (beta * pair.lost.divergence - beta * pair.won.divergence))


def tdpo2(pair: Answers, beta: Decimal, alpha: Decimal) -> Decimal:
    """The same paper: log sigma(u - alpha delta2), delta2 = beta K_l - sg(beta K_w)."""
    u = beta * (sum(pair.won.ratios) - sum(pair.lost.ratios))
    return cross_entropy(u - alpha * (beta * pair.lost.divergence - beta * pair.frozen.won.divergence))


def rrpo(pair: Answers, beta: Decimal, alpha: Decimal) -> Decimal:
    """Sarkar and Etemad 2025 (arXiv 2504.12083): -log sigma of beta times the log-ratios of the phrases that differ,
    and alpha times the chosen answer's token-wise KL. Here tokens differ that the other answer has not at all."""
    rewards = [
        sum((d for d, y in zip(mine.ratios, mine.ids, strict=True) if y not in other.ids), Decimal(0))
        for mine, other in ((pair.won, pair.lost), (pair.lost, pair.won))
    ]
    return cross_entropy(beta * (rewards[0] - rewards[1])) + alpha * pair.won.divergence


def pmpo(pair: Answers, alpha: Decimal, beta: Decimal) -> Decimal:
    """Abdolmaleki et al. 2024 (arXiv 2410.04166), Eq. 10: alpha E log pi(good) - (1 - alpha) E log pi(bad) - beta KL,
    which is maximised, with the KL of the two answers' prefixes."""
    kl = (pair.won.divergence + pair.lost.divergence) / 2
    return -(alpha * pair.won.logp - (ONE - alpha) * pair.lost.logp - beta * kl)


LOSSES: dict[str, Callable[..., Decimal]] = {"tdpo1": tdpo1, "tdpo2": tdpo2, "rrpo": rrpo, "pmpo": pmpo}


def value(name: str, pair: Answers, **parameters: float) -> Decimal:
    with localcontext(DIGITS):
        return LOSSES[name](pair, **{key: Decimal(number) for key, number in parameters.items()})


def slope(name: str, pair: Answers, side: str, token: int, word: int, **parameters: float) -> Decimal:
    """d loss / d one of the policy's logits."""
    with localcontext(DIGITS):
        up, down = (value(name, pair.moved(side, token, word, by), **parameters) for by in (STEP, -STEP))
        return (up - down) / (2 * STEP)
