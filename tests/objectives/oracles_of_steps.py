"""Losses of a whole step as their papers print them, over a list of pairs in decimal arithmetic.

As in oracles.py nothing is rearranged to be stable, and what a paper holds constant is read from `Pair.frozen`.
`before` is what the step before has left, `None` before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

from tests.objectives.oracles import DIGITS, ONE, STEP, Pair, cross_entropy, dpo, sigma, simpo

Numbers = list[Decimal]
Answer = tuple[Decimal, Decimal, Decimal]  # log-prob under policy and reference, score


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a step's pairs beside their log-probs, pair by pair."""

    draws: Numbers
    groups: list[int]
    num_groups: int
    embeddings: list[Numbers]
    others: list[list[Answer]]


def _mean(numbers: Sequence[Decimal]) -> Decimal:
    return sum(numbers, Decimal(0)) / len(numbers)


def _losses(pairs: Sequence[Pair], beta: Decimal) -> Numbers:
    return [dpo(pair, beta).loss for pair in pairs]


def kto(
    pairs: Sequence[Pair],
    told: Told,
    before: Any,
    beta: Decimal,
    desirable_weight: Decimal,
    undesirable_weight: Decimal,
) -> tuple[Numbers, Any]:
    """Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 7: lambda_y - v, v = lambda_D sigma(beta (D - z_0)) of a desirable
    answer and lambda_U sigma(beta (z_0 - D)) of an undesirable one, over both answers of every pair. By its authors'
    first release z_0 is held, max(0, the mean D of the step's answers of the other kind)."""
    held = [pair.frozen.logratios for pair in pairs]
    of_rejected, of_chosen = (max(Decimal(0), _mean([both[side] for both in held])) for side in (1, 0))
    losses = []
    for pair in pairs:
        won, lost = pair.logratios
        desirable = desirable_weight - desirable_weight * sigma(beta * (won - of_rejected))
        undesirable = undesirable_weight - undesirable_weight * sigma(beta * (of_chosen - lost))
        losses.append(_mean([desirable, undesirable]))
    return losses, None


def dr_dpo(pairs: Sequence[Pair], told: Told, before: Any, beta: Decimal, beta_prime: Decimal) -> tuple[Numbers, Any]:
    """Wu et al. 2024 (arXiv 2407.07880), Eq. 12: -b' log E exp(-l / b'), the loss of the step and so of each pair."""
    robust = -beta_prime * _mean([(-loss / beta_prime).exp() for loss in _losses(pairs, beta)]).ln()
    return [robust] * len(pairs), None


def beta_dpo(
    pairs: Sequence[Pair],
    told: Told,
    before: tuple[Decimal, Decimal] | None,
    beta: Decimal,
    sensitivity: Decimal,
    filtered_share: Decimal,
    momentum: Decimal,
) -> tuple[Numbers, tuple[Decimal, Decimal]]:
    """Wu et al. 2024 (arXiv 2407.08639), Eq. 7 to 10: M_i = h_i, running mean and deviation, sampling by
    exp(-(M_i - M_0)^2 / (2 sigma^2)), beta_batch = [1 + alpha (mean M - M_0)] beta_0."""
    margins = [_h(pair.frozen) for pair in pairs]
    mean = _mean(margins)
    deviation = (sum((m - mean) ** 2 for m in margins) / (len(margins) - 1)).sqrt()
    of_mean, of_deviation = before or (Decimal(0), Decimal(0))
    running = momentum * of_mean + (1 - momentum) * mean
    spread = momentum * of_deviation + (1 - momentum) * deviation
    weights = [(-((m - running) ** 2) / (2 * spread**2)).exp() for m in margins]
    keys = [draw.ln() / weight for draw, weight in zip(told.draws, weights, strict=True)]  # of u^(1/w), its logarithm
    count = int(len(pairs) * (1 - filtered_share))
    kept = sorted(range(len(pairs)), key=keys.__getitem__)[-count:]
    batch = max(beta * (1 + sensitivity * (_mean([margins[i] for i in kept]) - running)), Decimal("0.001"))
    share = Decimal(len(pairs)) / count  # so that the mean over all pairs is that of the kept
    losses = [share * cross_entropy(batch * _h(pair)) if i in kept else Decimal(0) for i, pair in enumerate(pairs)]
    return losses, (running, spread)


def _h(pair: Pair) -> Decimal:
    won, lost = pair.logratios
    return won - lost


def _targets(margins: Numbers, gamma_0: Decimal, tau: Decimal) -> Numbers:
    """Sun et al. 2025 (arXiv 2506.03690), Eq. 6: gamma_i = gamma_0 n p_i, p by 20 steps p <- p exp(-rate * slope) / Z
    of the mean of -log sigma(r_i - gamma_i) + tau sum_i p_i log(n p_i)."""
    n = len(margins)
    p = [ONE / n] * n
    rate = min(Decimal("0.5") / tau, ONE)
    for _ in range(20):
        slopes = [
            gamma_0 / (1 + (r - gamma_0 * n * q).exp()) + tau * (1 + (n * q).ln())
            for r, q in zip(margins, p, strict=True)
        ]
        p = [q * (-rate * slope).exp() for q, slope in zip(p, slopes, strict=True)]
        p = [q / sum(p) for q in p]
    return [gamma_0 * n * q for q in p]


def gamma_po(
    pairs: Sequence[Pair], told: Told, before: Numbers | None, beta: Decimal, gamma_beta_ratio: Decimal, tau: Decimal
) -> tuple[Numbers, Numbers]:
    """Its DPO: -log sigma(margin - (gamma_i - gamma_0)). The window is the step's margins and all before it."""
    margins = [dpo(pair.frozen, beta).log_odds for pair in pairs]
    gamma_0 = gamma_beta_ratio * beta
    targets = _targets([*margins, *(before or [])], gamma_0, tau)
    losses = [
        cross_entropy(dpo(pair, beta).log_odds - (target - gamma_0))
        for pair, target in zip(pairs, targets, strict=False)
    ]
    return losses, [*(before or []), *margins]


def gamma_simpo(
    pairs: Sequence[Pair], told: Told, before: Numbers | None, beta: Decimal, gamma_beta_ratio: Decimal, tau: Decimal
) -> tuple[Numbers, Numbers]:
    """Its SimPO: -log sigma(margin of mean log-probs - gamma_i)."""
    margins = [simpo(pair.frozen, beta, Decimal(0)).log_odds for pair in pairs]
    targets = _targets([*margins, *(before or [])], gamma_beta_ratio * beta, tau)
    losses = [
        cross_entropy(simpo(pair, beta, Decimal(0)).log_odds - target)
        for pair, target in zip(pairs, targets, strict=False)
    ]
    return losses, [*(before or []), *margins]


def group_dpo(
    pairs: Sequence[Pair], told: Told, before: Numbers | None, beta: Decimal, eta: Decimal
) -> tuple[Numbers, Numbers]:
    """Ramesh et al. 2024 (arXiv 2405.20304), Algorithm 1: q_g <- q_g exp(eta L_g) / Z, then sum_g q_g L_g."""
    q = before or [ONE / told.num_groups] * told.num_groups
    counts = [told.groups.count(group) for group in range(told.num_groups)]
    held = _losses([pair.frozen for pair in pairs], beta)
    of_group = [
        sum((loss for loss, of in zip(held, told.groups, strict=True) if of == group), Decimal(0)) / max(count, 1)
        for group, count in enumerate(counts)
    ]
    q = [weight * (eta * loss).exp() for weight, loss in zip(q, of_group, strict=True)]
    q = [weight / sum(q) for weight in q]
    losses = [
        len(pairs) * q[of] / counts[of] * loss for loss, of in zip(_losses(pairs, beta), told.groups, strict=True)
    ]
    return losses, q


def relative_dpo(pairs: Sequence[Pair], told: Told, before: Any, beta: Decimal, tau: Decimal) -> tuple[Numbers, Any]:
    """Yin et al. 2024 (arXiv 2402.10958), Eq. 7 and 9: -log sigma(w_ij beta (D_w,i - D_l,j)), mean over j."""
    losses = []
    for i, pair in enumerate(pairs):
        alike = [(-(1 - _cosine(told.embeddings[i], other)) / tau).exp() for other in told.embeddings]
        contrasts = [
            cross_entropy(weight / sum(alike) * beta * (pair.logratios[0] - other.logratios[1]))
            for weight, other in zip(alike, pairs, strict=True)
        ]
        losses.append(_mean(contrasts))
    return losses, None


def _cosine(one: Numbers, other: Numbers) -> Decimal:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / (sum(a * a for a in one).sqrt() * sum(b * b for b in other).sqrt())


def relative_dpo_diagonal(
    pairs: Sequence[Pair], told: Told, before: Any, beta: Decimal, diagonal_weight: Decimal
) -> tuple[Numbers, Any]:
    """The same authors' code: one weight for i = j, and the rest for the mean over j other than i."""
    losses = []
    for i, pair in enumerate(pairs):
        contrasts = [cross_entropy(beta * (pair.logratios[0] - other.logratios[1])) for other in pairs]
        others = [loss for j, loss in enumerate(contrasts) if j != i]
        losses.append(diagonal_weight * contrasts[i] + (1 - diagonal_weight) * _mean(others))
    return losses, None


def mpo(pairs: Sequence[Pair], told: Told, before: Any, beta: Decimal, alpha: Decimal) -> tuple[Numbers, Any]:
    """Gupta et al. 2024 (arXiv 2412.04628): -log of the good answers' share of sum w pi^beta / pi_ref^beta, with w
    exp(alpha dS) of a good answer and exp(-alpha dS) of a bad one, dS its score less the mean."""
    losses = []
    for pair, others in zip(pairs, told.others, strict=True):
        answers = [(pair.a_w, pair.b_w, pair.s_w), (pair.a_l, pair.b_l, pair.s_l), *others]
        mean = _mean([score for *_, score in answers])
        parts = [((alpha * abs(s - mean)).exp() * (beta * (a - b)).exp(), s > mean) for a, b, s in answers]
        losses.append(-(sum(part for part, good in parts if good) / sum(part for part, _ in parts)).ln())
    return losses, None


def exo_reward(
    pairs: Sequence[Pair], told: Told, before: Any, beta: Decimal, score_temperature: Decimal
) -> tuple[Numbers, Any]:
    """Ji et al. 2024 (arXiv 2402.00856), EXO-rw: sum_k q_k log(q_k / t_k), q and t softmaxes of a prompt's answers."""
    losses = []
    for pair, others in zip(pairs, told.others, strict=True):
        answers = [(pair.a_w, pair.b_w, pair.s_w), (pair.a_l, pair.b_l, pair.s_l), *others]
        ours = [(beta * (a - b)).exp() for a, b, _ in answers]
        judged = [(score / score_temperature).exp() for *_, score in answers]
        shares = zip(ours, judged, strict=True)
        losses.append(sum(q / sum(ours) * (q / sum(ours) / (t / sum(judged))).ln() for q, t in shares))
    return losses, None


OBJECTIVES: dict[str, Callable[..., tuple[Numbers, Any]]] = {
    "kto": kto,
    "dr-dpo": dr_dpo,
    "beta-dpo": beta_dpo,
    "gamma-po": gamma_po,
    "gamma-simpo": gamma_simpo,
    "group-dpo": group_dpo,
    "relative-dpo": relative_dpo,
    "relative-dpo-diagonal": relative_dpo_diagonal,
    "mpo": mpo,
    "exo-reward": exo_reward,
}


def value(name: str, pairs: Sequence[Pair], told: Told, before: Any = None, **values: float) -> tuple[Numbers, Any]:
    """Each pair's loss, and what the step leaves."""
    with localcontext(DIGITS):
        return OBJECTIVES[name](pairs, told, before, **{key: Decimal(number) for key, number in values.items()})


def slopes(
    name: str, pairs: Sequence[Pair], told: Told, before: Any = None, **values: float
) -> tuple[Numbers, Numbers]:
    """Of the step's summed loss towards the chosen and the rejected log-probs of each pair, by difference quotients."""
    with localcontext(DIGITS):
        frozen = [pair.moved() for pair in pairs]

        def total(place: int, **by: Decimal) -> Decimal:
            moved = [pair.moved(**by) if i == place else pair for i, pair in enumerate(frozen)]
            return sum(value(name, moved, told, before, **values)[0], Decimal(0))

        return tuple(  # type: ignore[return-value]
            [(total(i, **{side: STEP}) - total(i, **{side: -STEP})) / (2 * STEP) for i in range(len(pairs))]
            for side in ("a_w", "a_l")
        )
