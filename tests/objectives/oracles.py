"""The losses as their papers print them, one pair at a time, in decimal arithmetic: the oracles of test_oracles.py.

Written from the cited equations by somebody who had not read the library's objectives. Nothing here is rearranged to
be stable: 45 digits make that needless, so a printed p^gamma is a power and a printed log p a logarithm.
What a paper holds constant (a stop-gradient) is read from `Pair.held`, so that a difference quotient leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from decimal import Context, Decimal, localcontext
from functools import partial
from typing import Any

DIGITS = Context(prec=45)
STEP = Decimal("1e-15")  # of difference quotients: their error is of the order of its square
ONE = Decimal(1)

Factor = Callable[[Decimal], Decimal]  # of the log-odds


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair: log-probs summed over the completion under policy (a) and reference (b), tokens (n), scores (s) and
    the policy's collision terms, sum_t log sum_v pi_v^2 (c); w is the chosen answer, l the rejected one."""

    a_w: Decimal
    a_l: Decimal
    b_w: Decimal
    b_l: Decimal
    n_w: Decimal
    n_l: Decimal
    s_w: Decimal
    s_l: Decimal
    c_w: Decimal
    c_l: Decimal
    held: Pair | None = None  # where whatever takes no gradient is read

    @classmethod
    def of(cls, **values: float) -> Pair:
        return cls(**{name: Decimal(value) for name, value in values.items()})

    @property
    def logratios(self) -> tuple[Decimal, Decimal]:
        return self.a_w - self.b_w, self.a_l - self.b_l

    @property
    def frozen(self) -> Pair:
        return self.held or self

    def moved(self, **by: Decimal) -> Pair:
        """The pair with some numbers raised, and its stop-gradients where they were."""
        return replace(self, held=self.frozen, **{name: getattr(self, name) + step for name, step in by.items()})


@dataclass(frozen=True, slots=True)
class Value:
    """A loss, the log-odds of the chosen answer being preferred, and the two rewards that a run logs."""

    loss: Decimal
    log_odds: Decimal
    rewards: tuple[Decimal, Decimal]


def sigma(x: Decimal) -> Decimal:
    return ONE / (ONE + (-x).exp())


def none(z: Decimal) -> Decimal:
    return ONE


# ---- the four factors ------------------------------------------------------------------------------------------------


def p_gamma(z: Decimal, gamma: Decimal) -> Decimal:
    """FocalPO, Liu et al. 2025 (arXiv 2501.06645), Eq. 4: p^gamma."""
    return sigma(z) ** gamma


def eq3(z: Decimal, gamma: Decimal) -> Decimal:
    """The same paper's Eq. 3: (1 - p)^-gamma, where 1 - sigma(z) = sigma(-z)."""
    return sigma(-z) ** -gamma


def hard(z: Decimal, gamma: Decimal) -> Decimal:
    """The same paper's Fig. 1, the focal loss of Lin et al. 2017: (1 - p)^gamma."""
    return sigma(-z) ** gamma


FACTORS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "p_gamma": p_gamma,
    "eq3": eq3,
    "hard": hard,
    "detached": p_gamma,  # read where it is held, see `factor_of`
}


def factor_of(form: str, gamma: Decimal, at: Decimal) -> Factor:
    """The factor as a function of the log-odds; the detached one is a constant, that of the log-odds `at`."""
    if form == "detached":
        return lambda z: p_gamma(at, gamma)
    return partial(FACTORS[form], gamma=gamma)


# ---- the losses of a Bradley-Terry form ------------------------------------------------------------------------------


def cross_entropy(z: Decimal, label_smoothing: Decimal = Decimal(0)) -> Decimal:
    """-(1-e) log sigma(z) - e log sigma(-z): DPO with e = 0, cDPO with more (Mitchell 2023, Eq. 3)."""
    smoothed = label_smoothing * sigma(-z).ln() if label_smoothing else Decimal(0)
    return -(ONE - label_smoothing) * sigma(z).ln() - smoothed


def debiased(z: Decimal, label_smoothing: Decimal) -> Decimal:
    """rDPO, Chowdhury et al. 2024 (arXiv 2403.00409): ((1-e) L(y_w, y_l) - e L(y_l, y_w)) / (1 - 2e)."""
    e = label_smoothing
    return ((ONE - e) * cross_entropy(z) - e * cross_entropy(-z)) / (ONE - 2 * e)


def dpo(x: Pair, beta: Decimal, factor: Factor = none) -> Value:
    """Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7."""
    won, lost = (beta * ratio for ratio in x.logratios)
    return Value(factor(won - lost) * cross_entropy(won - lost), won - lost, (won, lost))


def cdpo(x: Pair, beta: Decimal, label_smoothing: Decimal, factor: Factor = none) -> Value:
    value = dpo(x, beta)
    loss = cross_entropy(value.log_odds, label_smoothing)
    return replace(value, loss=factor(value.log_odds) * loss)


def robust_dpo(x: Pair, beta: Decimal, label_smoothing: Decimal, factor: Factor = none) -> Value:
    value = dpo(x, beta)
    return replace(value, loss=factor(value.log_odds) * debiased(value.log_odds, label_smoothing))


def h_dpo(x: Pair, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Value:
    """Omura et al. 2024 (arXiv 2411.07595): log sigma(alpha beta log pi_w/pi_l - beta log ref_w/ref_l)."""
    z = alpha * beta * (x.a_w - x.a_l) - beta * (x.b_w - x.b_l)
    return Value(factor(z) * cross_entropy(z), z, (beta * (alpha * x.a_w - x.b_w), beta * (alpha * x.a_l - x.b_l)))


def dpo_shift(x: Pair, beta: Decimal, rejected_factor: Decimal, factor: Factor = none) -> Value:
    """Yang et al. 2025 (arXiv 2502.07599): f(lambda) on the rejected log-ratio."""
    won, lost = x.logratios
    z = beta * won - rejected_factor * beta * lost
    return Value(factor(z) * cross_entropy(z), z, (beta * won, rejected_factor * beta * lost))


def odpo(x: Pair, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Value:
    """Amini et al. 2024 (arXiv 2402.10571): minus alpha log of the gap of the scores, inside the sigmoid."""
    value = dpo(x, beta)
    z = value.log_odds - alpha * (x.s_w - x.s_l).ln()
    return Value(factor(z) * cross_entropy(z), z, value.rewards)


def simpo(x: Pair, beta: Decimal, gamma_beta_ratio: Decimal, factor: Factor = none) -> Value:
    """Meng et al. 2024 (arXiv 2405.14734), Eq. 6: beta times mean log-probs, minus the target margin."""
    won, lost = beta / x.n_w * x.a_w, beta / x.n_l * x.a_l
    z = won - lost - gamma_beta_ratio * beta
    return Value(factor(z) * cross_entropy(z), z, (won, lost))


def alphapo(x: Pair, beta: Decimal, gamma_beta_ratio: Decimal, alpha: Decimal, factor: Factor = none) -> Value:
    """Gupta et al. 2025 (arXiv 2501.03884): the reward (1 - pbar^-alpha) / alpha, pbar the length-normalised
    probability; alpha -> 0 is SimPO."""
    if alpha == 0:
        return simpo(x, beta, gamma_beta_ratio, factor)
    pbar_w, pbar_l = (x.a_w / x.n_w).exp(), (x.a_l / x.n_l).exp()
    won, lost = (beta * (ONE - pbar**-alpha) / alpha for pbar in (pbar_w, pbar_l))
    z = won - lost - gamma_beta_ratio * beta
    return Value(factor(z) * cross_entropy(z), z, (won, lost))


def length_dpo(x: Pair, beta: Decimal, alpha: Decimal, factor: Factor = none) -> Value:
    """R-DPO, Park et al. 2024 (arXiv 2403.19159): plus alpha |y_w| - alpha |y_l| inside the sigmoid."""
    value = dpo(x, beta)
    z = value.log_odds + (alpha * x.n_w - alpha * x.n_l)
    return Value(factor(z) * cross_entropy(z), z, value.rewards)


def dpo_norm(x: Pair, beta: Decimal, factor: Factor = none) -> Value:
    """Lambert et al. 2024 (Tulu 3, arXiv 2411.15124): each log-ratio over its answer's length."""
    won, lost = (beta * ratio / n for ratio, n in zip(x.logratios, (x.n_w, x.n_l), strict=True))
    return Value(factor(won - lost) * cross_entropy(won - lost), won - lost, (won, lost))


def cpo(x: Pair, beta: Decimal, nll_weight: Decimal, factor: Factor = none) -> Value:
    """Xu et al. 2024 (arXiv 2401.08417), Eq. 3 to 5: a uniform reference, plus the chosen answer's negative
    log-likelihood, on which no factor acts: a token's mean, as in the trainer that its authors gave to TRL."""
    won, lost = beta * x.a_w, beta * x.a_l
    preference = factor(won - lost) * cross_entropy(won - lost)
    return Value(preference - nll_weight * x.a_w / x.n_w, won - lost, (won, lost))


# ---- weightings of their own -----------------------------------------------------------------------------------------


def wpo(x: Pair, beta: Decimal) -> Value:
    """Zhou et al. 2024 (arXiv 2406.11827), Eq. 2: DPO times the held weights of both answers, each the
    geometric mean over tokens of pi(y_t) / sum_v pi_v^2."""
    at, value = x.frozen, dpo(x, beta)
    won, lost = (at.a_w - at.c_w) / at.n_w, (at.a_l - at.c_l) / at.n_l
    return replace(value, loss=won.exp() * lost.exp() * value.loss)


def omni_dpo(
    x: Pair, beta: Decimal, eta: Decimal, tau_ref: Decimal, gamma: Decimal, nll_weight: Decimal, tau_good: Decimal
) -> Value:
    """Peng et al. 2025 (arXiv 2506.10054): w_qual w_perf times DPO on mean log-probs, plus the calibrated NLL of good
    chosen answers that the policy finds less likely than the reference does."""
    a_w, a_l, b_w, b_l = x.a_w / x.n_w, x.a_l / x.n_l, x.b_w / x.n_w, x.b_l / x.n_l
    z = beta * (a_w - b_w) - beta * (a_l - b_l)
    quality = sigma(eta * (x.s_w - x.s_l))
    performance = (ONE - sigma(beta * (a_w - a_l) - tau_ref)) ** gamma
    calibrated = -a_w if b_w > a_w and x.s_w >= tau_good else Decimal(0)
    loss = quality * performance * cross_entropy(z) + nll_weight * calibrated
    return Value(loss, z, (beta * (a_w - b_w), beta * (a_l - b_l)))


# ---- by the registry's names -----------------------------------------------------------------------------------------

WRAPPABLE: dict[str, Callable[..., Value]] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "robust-dpo": robust_dpo,
    "h-dpo": h_dpo,
    "dpo-shift": dpo_shift,
    "odpo": odpo,
    "simpo": simpo,
    "alphapo": alphapo,
    "length-dpo": length_dpo,
    "dpo-norm": dpo_norm,
    "cpo": cpo,
}
FOCAL = {"focalpo": "p_gamma", "focalpo-eq3": "eq3", "focal-hard": "hard", "focalpo-detached": "detached"}
WEIGHTED: dict[str, Callable[..., Value]] = {"wpo": wpo, "omni-dpo": omni_dpo}
NAMES = [*WRAPPABLE, *FOCAL, *WEIGHTED]


def exactly(parameters: dict[str, Any]) -> dict[str, Decimal]:
    """The floats that the library is given, digit for digit."""
    return {name: Decimal(value) for name, value in parameters.items()}


def value(name: str, x: Pair, focal: dict[str, Any] | None = None, **parameters: float) -> Value:
    """The objective `name` of one pair, by its paper; `focal` as the library's wrapper takes it."""
    if name in FOCAL:
        gamma = parameters.pop("gamma")
        return value("dpo", x, focal={"form": FOCAL[name], "gamma": gamma}, **parameters)
    with localcontext(DIGITS):
        loss = (WRAPPABLE | WEIGHTED)[name]
        if focal is None:
            return loss(x, **exactly(parameters))
        at = loss(x.frozen, **exactly(parameters)).log_odds
        factor = factor_of(focal.get("form", "p_gamma"), Decimal(focal["gamma"]), at)
        return loss(x, **exactly(parameters), factor=factor)


def slopes(
    name: str, x: Pair, focal: dict[str, Any] | None = None, of: str = "loss", **parameters: float
) -> tuple[Decimal, Decimal]:
    """Of the loss (or the log-odds) in the policy's two log-probs, by central differences."""

    def at(side: str, step: Decimal) -> Decimal:
        return getattr(value(name, x.moved(**{side: step}), focal, **parameters), of)

    with localcontext(DIGITS):
        chosen, rejected = ((at(side, STEP) - at(side, -STEP)) / (2 * STEP) for side in ("a_w", "a_l"))
        return chosen, rejected


def preference(
    z: float, form: str | None = None, gamma: float = 0, link: Callable[[Decimal], Decimal] | None = None
) -> Decimal:
    """The loss at these log-odds: a link (-log p without one) times a factor."""
    with localcontext(Context(prec=DIGITS.prec + int(abs(z) / 2))):  # 1 + e^-z needs the digits
        at = Decimal(z)
        factor = none if form is None else factor_of(form, Decimal(gamma), at)
        return factor(at) * (link or cross_entropy)(at)


def weight(form: str, gamma: float, z: float) -> Decimal:
    """-dL/dz of -log p with a factor, at the log-odds z, by a central difference."""
    with localcontext(DIGITS):
        at = Decimal(z)
        factor = factor_of(form, Decimal(gamma), at)
        up, down = (factor(at + step) * cross_entropy(at + step) for step in (STEP, -STEP))
        return (down - up) / (2 * STEP)


def numbers(x: Pair) -> dict[str, float]:
    """The pair as floats, by name."""
    return {field.name: float(getattr(x, field.name)) for field in fields(x) if field.name != "held"}
