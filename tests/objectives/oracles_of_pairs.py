"""More losses as their papers print them, one pair at a time, in decimal arithmetic: of pairs, averages and scores.

What oracles.py says of itself holds here: nothing is rearranged to be stable, 45 digits make that needless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

from tests.objectives import oracles
from tests.objectives.oracles import DIGITS, ONE, STEP, Factor, Pair, cross_entropy, dpo, exactly, none, sigma

HALF, ZERO = Decimal("0.5"), Decimal(0)


class Value(NamedTuple):
    """A loss, the log-odds of the chosen answer being preferred where there are any, and the two rewards."""

    loss: Decimal
    log_odds: Decimal | None
    rewards: tuple[Decimal, Decimal]


def logistic(won: Decimal, lost: Decimal, factor: Factor) -> Value:
    """-log sigma of the difference of two rewards, times a factor."""
    z = won - lost
    return Value(factor(z) * cross_entropy(z), z, (won, lost))


def ratios(x: Pair) -> tuple[Decimal, Decimal]:
    """pi / pi_ref of both answers."""
    won, lost = x.logratios
    return won.exp(), lost.exp()


# ---- rewards of their own --------------------------------------------------------------------------------------------


def dpo_gamma(x: Pair, beta: Decimal, reference_strength: Decimal, factor: Factor = none) -> Value:
    """Chen et al. 2024 (arXiv 2405.19534), Eq. 4: the reference's ratio to the power gamma."""
    won, lost = (beta * (a - reference_strength * b) for a, b in ((x.a_w, x.b_w), (x.a_l, x.b_l)))
    return logistic(won, lost, factor)


def flex_dpo(x: Pair, beta: Decimal, beta_rejected: Decimal, factor: Factor = none) -> Value:
    """Yan et al. 2024 (arXiv 2406.07327): a beta for each side."""
    won, lost = x.logratios
    return logistic(beta * won, beta_rejected * lost, factor)


def dpop(x: Pair, beta: Decimal, lambda_: Decimal, factor: Factor = none) -> Value:
    """Pal et al. 2024 (arXiv 2402.13228): beta (log ratio_w - log ratio_l - lambda max(0, log pi_ref / pi of w))."""
    won, lost = x.logratios
    z = beta * (won - lost - lambda_ * max(ZERO, x.b_w - x.a_w))
    return Value(factor(z) * cross_entropy(z), z, (beta * won, beta * lost))


def f_dpo_forward_kl(x: Pair, beta: Decimal, factor: Factor = none) -> Value:
    """Wang et al. 2023 (arXiv 2309.16240): f(u) = -log u, f'(u) = -1/u. The reward is 0 at u = 1 by a constant."""
    won, lost = (beta * (ONE - ONE / u) for u in ratios(x))
    return logistic(won, lost, factor)


def f_dpo_js(x: Pair, beta: Decimal, factor: Factor = none) -> Value:
    """The same paper: f'(u) = log 2u / (1 + u)."""
    won, lost = (beta * (2 * u / (ONE + u)).ln() for u in ratios(x))
    return logistic(won, lost, factor)


def f_dpo_alpha(x: Pair, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Value:
    """The same paper: f'(u) = (1 - u^-alpha) / alpha."""
    won, lost = (beta * (ONE - u**-alpha) / alpha for u in ratios(x))
    return logistic(won, lost, factor)


def mappo(x: Pair, beta: Decimal, factor: Factor = none) -> Value:
    """Lan et al. 2025 (arXiv 2507.21183), Eq. 8: the rejected log-ratio times the gap of the rewards."""
    won, lost = x.logratios
    return logistic(beta * won, beta * (x.s_w - x.s_l) * lost, factor)


# ---- with something beside -------------------------------------------------------------------------------------------


def beside(x: Pair, beta: Decimal, factor: Factor, more: Decimal) -> Value:
    value = dpo(x, beta, factor)
    return Value(value.loss + more, value.log_odds, value.rewards)


def regularised_rpo(x: Pair, beta: Decimal, eta: Decimal, factor: Factor = none) -> Value:
    """Liu et al. 2024 (arXiv 2405.16436): eta beta E[-log pi(y_w)] beside DPO's loss, of whole answers."""
    return beside(x, beta, factor, eta * beta * -x.a_w)


def irpo(x: Pair, beta: Decimal, nll_weight: Decimal, factor: Factor = none) -> Value:
    """Pang et al. 2024 (arXiv 2404.19733): alpha -log pi(y_w) / |y_w| beside it."""
    return beside(x, beta, factor, nll_weight * -x.a_w / x.n_w)


def anchored_dpo(x: Pair, beta: Decimal, anchor: Decimal, factor: Factor = none) -> Value:
    """Wang et al. 2024 (arXiv 2406.11839): -log sigma(beta log ratio_w - delta) beside it."""
    return beside(x, beta, factor, -sigma(beta * x.logratios[0] - anchor).ln())


# ---- losses of the margin that are not -log p ------------------------------------------------------------------------


def exo(x: Pair, beta: Decimal, label_smoothing: Decimal, factor: Factor = none) -> Value:
    """Ji et al. 2024 (arXiv 2402.00856), Eq. 16: the KL from the policy's coin to (1 - e, e)."""
    z = dpo(x, beta).log_odds
    p = sigma(z)
    loss = p * (p / (ONE - label_smoothing)).ln() + sigma(-z) * (sigma(-z) / label_smoothing).ln()
    return Value(factor(z) * loss, z, dpo(x, beta).rewards)


def discopop(x: Pair, beta: Decimal, tau: Decimal, factor: Factor = none) -> Value:
    """Lu et al. 2024 (arXiv 2406.08414), Eq. 5: sigma(z / tau) mixes the logistic and the exponential loss."""
    z = dpo(x, beta).log_odds
    loss = (ONE - sigma(z / tau)) * cross_entropy(z) + sigma(z / tau) * (-z).exp()
    return Value(factor(z) * loss, z, dpo(x, beta).rewards)


def hinge(x: Pair, beta: Decimal) -> Value:
    """Liu et al. 2023 (arXiv 2309.06657), hinge-norm: max(0, 1 - gamma h)."""
    won, lost = dpo(x, beta).rewards
    return Value(max(ZERO, ONE - (won - lost)), None, (won, lost))


def repo(x: Pair, target_margin: Decimal) -> Value:
    """Wu et al. 2025 (arXiv 2503.07426): max(0, gamma - (mean log-prob of w - of l))."""
    won, lost = x.a_w / x.n_w, x.a_l / x.n_l
    return Value(max(ZERO, target_margin - (won - lost)), None, (won, lost))


def ipo_sum(x: Pair, tau: Decimal) -> Value:
    """Azar et al. 2023 (arXiv 2310.12036), Eq. 17: (h - 1 / (2 tau))^2."""
    won, lost = x.logratios
    return Value((won - lost - ONE / (2 * tau)) ** 2, None, (tau * won, tau * lost))


def ipo(x: Pair, tau: Decimal) -> Value:
    """The same of log-ratios over their answers' lengths, by the authors' word to TRL."""
    return ipo_sum(replace(x, a_w=x.a_w / x.n_w, b_w=x.b_w / x.n_w, a_l=x.a_l / x.n_l, b_l=x.b_l / x.n_l), tau)


def sppo(x: Pair, beta: Decimal) -> Value:
    """Wu et al. 2024 (arXiv 2405.00675), Eq. 4.7: each log-ratio towards eta (P - 1/2), eta = 1 / beta."""
    won, lost = x.logratios
    loss = (won - (x.s_w - HALF) / beta) ** 2 + (lost - (x.s_l - HALF) / beta) ** 2
    return Value(loss, None, (beta * won, beta * lost))


def sppo_hard(x: Pair, beta: Decimal) -> Value:
    return sppo(replace(x, s_w=ONE, s_l=ZERO), beta)


def orpo(x: Pair, lambda_: Decimal) -> Value:
    """Hong et al. 2024 (arXiv 2403.07691), Eq. 6 and 7: the chosen answer's NLL and lambda times -log sigma of the log
    of the odds ratio, where P is an answer's probability a token and odds(P) = P / (1 - P)."""
    p_w, p_l = (x.a_w / x.n_w).exp(), (x.a_l / x.n_l).exp()
    ratio = (p_w / (ONE - p_w)) / (p_l / (ONE - p_l))
    return Value(-p_w.ln() - lambda_ * sigma(ratio.ln()).ln(), None, (lambda_ * p_w.ln(), lambda_ * p_l.ln()))


# ---- by a judge's scores ---------------------------------------------------------------------------------------------


def coins(one: Decimal, other: Decimal) -> Decimal:
    """KL between two coins of these log-odds."""
    p, q = (sigma(one), sigma(-one)), (sigma(other), sigma(-other))
    return sum((of * (of / to).ln() for of, to in zip(p, q, strict=True)), ZERO)


def reward_aware(distance: Callable[[Decimal, Decimal], Decimal]) -> Callable[..., Value]:
    """Sun et al. 2025 (arXiv 2502.00203): a distance between the implicit margin and eta times the explicit one."""

    def loss(x: Pair, beta: Decimal, eta: Decimal) -> Value:
        value = dpo(x, beta)
        return Value(distance(value.log_odds, eta * (x.s_w - x.s_l)), value.log_odds, value.rewards)

    return loss


def todo(x: Pair, beta: Decimal, alpha: Decimal) -> Value:
    """Guo et al. 2024 (arXiv 2411.02442): Rao and Kupper's probabilities of a preference and of a tie."""
    value = dpo(x, beta)
    z = value.log_odds
    better = z.exp() / (z.exp() + alpha.exp())
    tie = ((2 * alpha).exp() - 1) / ((1 + (alpha + z).exp()) * (1 + (alpha - z).exp()))
    return Value(-(tie if x.s_w == x.s_l else better).ln(), z - alpha, value.rewards)


# ---- by the registry's names -----------------------------------------------------------------------------------------

WRAPPABLE: dict[str, Callable[..., Value]] = {
    "dpo-gamma": dpo_gamma,
    "flex-dpo": flex_dpo,
    "dpop": dpop,
    "f-dpo-forward-kl": f_dpo_forward_kl,
    "f-dpo-js": f_dpo_js,
    "f-dpo-alpha": f_dpo_alpha,
    "mappo": mappo,
    "regularised-rpo": regularised_rpo,
    "irpo": irpo,
    "anchored-dpo": anchored_dpo,
    "exo": exo,
    "discopop": discopop,
}
OTHERS: dict[str, Callable[..., Value]] = {
    "hinge": hinge,
    "repo": repo,
    "ipo": ipo,
    "ipo-sum": ipo_sum,
    "orpo": orpo,
    "sppo": sppo,
    "sppo-hard": sppo_hard,
    "reward-aware-squared": reward_aware(lambda z, target: (z - target) ** 2),
    "reward-aware-backward": reward_aware(lambda z, target: coins(target, z)),
    "reward-aware-forward": reward_aware(coins),
    "todo": todo,
}
NAMES = [*WRAPPABLE, *OTHERS]


def value(name: str, x: Pair, focal: dict[str, Any] | None = None, **parameters: float) -> Value:
    """The objective `name` of one pair, by its paper; `focal` as the library's wrapper takes it."""
    with localcontext(DIGITS):
        loss, exact = (WRAPPABLE | OTHERS)[name], exactly(parameters)
        if focal is None:
            return loss(x, **exact)
        at = loss(x.frozen, **exact).log_odds
        assert at is not None
        return loss(x, **exact, factor=oracles.factor_of(focal["form"], Decimal(focal["gamma"]), at))


def slopes(name: str, x: Pair, focal: dict[str, Any] | None = None, **parameters: float) -> tuple[Decimal, Decimal]:
    """Of the loss in the policy's two log-probs, by central differences."""

    def at(side: str, step: Decimal) -> Decimal:
        return value(name, x.moved(**{side: step}), focal, **parameters).loss

    with localcontext(DIGITS):
        chosen, rejected = ((at(side, STEP) - at(side, -STEP)) / (2 * STEP) for side in ("a_w", "a_l"))
        return chosen, rejected
