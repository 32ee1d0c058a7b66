"""Losses of a pair and further answers as their papers print them, in decimal arithmetic.

What oracles.py says of itself holds here. A pair has the further answers `ys`: each the policy's log-prob, the
reference's, and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import NamedTuple

from tests.objectives.oracles import DIGITS, STEP, Factor, Pair, cross_entropy, dpo, exactly, factor_of, none


class Other(NamedTuple):
    """A further answer: log-probs summed under policy and reference, and its tokens."""

    a: Decimal
    b: Decimal
    n: Decimal


Ys = Sequence[Other]


def triple_po(x: Pair, ys: Ys, beta: Decimal, nll_weight: Decimal, factor: Factor = none) -> Decimal:
    """Saeidi et al. 2024 (arXiv 2405.16681): -log sigma(beta log pi_w - beta log pi_l) - alpha log pi(gold), of which
    the authors' code takes a token's mean."""
    z = beta * x.a_w - beta * x.a_l
    return factor(z) * cross_entropy(z) - nll_weight * sum(y.a / y.n for y in ys)


def triple_po_length(
    x: Pair, ys: Ys, beta: Decimal, target_margin: Decimal, nll_weight: Decimal, factor: Factor = none
) -> Decimal:
    """The same paper's TPO-L: -log sigma(beta / |y_w| log pi_w - beta / |y_l| log pi_l - gamma)."""
    z = beta / x.n_w * x.a_w - beta / x.n_l * x.a_l - target_margin
    return factor(z) * cross_entropy(z) - nll_weight * sum(y.a / y.n for y in ys)


def rationale_dpo(x: Pair, ys: Ys, beta: Decimal, rationale_scale: Decimal, factor: Factor = none) -> Decimal:
    """Just et al. 2024 (arXiv 2407.14477): DPO - log sigma(gamma log pi(rationale))."""
    z = dpo(x, beta).log_odds
    return factor(z) * cross_entropy(z) + sum(cross_entropy(rationale_scale * y.a) for y in ys)


def xpo(x: Pair, ys: Ys, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Decimal:
    """Xie et al. 2024 (arXiv 2405.21046), Algorithm 1: DPO + alpha log pi(y), y sampled from the reference."""
    z = dpo(x, beta).log_odds
    return factor(z) * cross_entropy(z) + alpha * sum(y.a for y in ys)


def selm(x: Pair, ys: Ys, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Decimal:
    """Zhang et al. 2024 (arXiv 2405.19332), its code: DPO + alpha beta log(pi / pi_ref)(y), y sampled from pi."""
    z = dpo(x, beta).log_odds
    return factor(z) * cross_entropy(z) + alpha * beta * sum(y.a - y.b for y in ys)


LOSSES: dict[str, Callable[..., Decimal]] = {
    "triple-po": triple_po,
    "triple-po-length": triple_po_length,
    "rationale-dpo": rationale_dpo,
    "xpo": xpo,
    "selm": selm,
}


def value(name: str, x: Pair, ys: Ys, form: str | None = None, gamma: float = 0.0, **parameters: float) -> Decimal:
    """The objective `name` of one pair, with the factor `form` around its preference term."""
    with localcontext(DIGITS):
        factor = none if form is None else factor_of(form, Decimal(gamma), Decimal(0))
        return LOSSES[name](x, ys, **exactly(parameters), factor=factor)


def slopes(
    name: str, x: Pair, ys: Ys, form: str | None = None, gamma: float = 0.0, **parameters: float
) -> list[Decimal]:
    """In the policy's log-probs of chosen, rejected and each further answer, by central differences."""

    def at(step: Decimal, place: int) -> Decimal:
        if place < 2:
            return value(name, x.moved(**{("a_w", "a_l")[place]: step}), ys, form, gamma, **parameters)
        moved = [y._replace(a=y.a + step) if number == place - 2 else y for number, y in enumerate(ys)]
        return value(name, x, moved, form, gamma, **parameters)

    with localcontext(DIGITS):
        return [(at(STEP, place) - at(-STEP, place)) / (2 * STEP) for place in range(2 + len(ys))]
