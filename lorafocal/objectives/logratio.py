"""DPO's kin: log-odds of the policy's and the reference's log-probs, weighted or normalised in other ways."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, average_logps, implicit, rewards, widen


def h_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Odds:
    """H-DPO: a reward is beta * (alpha * log pi - log pi_ref); alpha below 1 makes for a sharper policy, 1 is DPO.

    At the start the log-odds are not 0: there they are beta * (alpha - 1) * (log pi of chosen - of rejected).
    Source: Omura et al. 2024, arXiv:2411.07595.
    """
    sharpened = PairLogps(*(alpha * widen(side) for side in policy))
    return implicit(sharpened, reference, beta=beta)


def dpo_shift(policy: PairLogps, reference: PairLogps, *, beta: float, rejected_factor: float) -> Odds:
    """DPO-Shift: the rejected answer's reward counts by a constant factor in (0, 1]; 1 is DPO.

    Less is gained by making rejected answers unlikely, and so chosen ones lose less on the way.
    Source: Yang et al. 2025, arXiv:2502.07599, with its f(lambda) a constant.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    rejected = rejected_factor * rejected
    return Odds(chosen - rejected, chosen, rejected)


def length_dpo(policy: PairLogps, reference: PairLogps, *, lengths: Tensor, beta: float, alpha: float) -> Odds:
    """R-DPO: margin + alpha * (tokens of chosen - tokens of rejected); alpha = 0 is DPO.

    A longer chosen answer needs no further margin, so length alone is learned less. `lengths` (2B,), chosen first.
    Source: Park et al. 2024, arXiv:2403.19159.
    """
    odds = implicit(policy, reference, beta=beta)
    chosen, rejected = lengths.to(odds.log_odds).split(len(odds.log_odds))
    return odds._replace(log_odds=odds.log_odds + alpha * (chosen - rejected))


def dpo_norm(policy: PairLogps, reference: PairLogps, *, lengths: Tensor, beta: float) -> Odds:
    """Length-normalised DPO: a reward is beta * the mean over an answer's tokens of log pi - log pi_ref.

    `lengths` (2B,) are completion tokens, chosen first.
    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124.
    """
    return implicit(average_logps(policy, lengths), average_logps(reference, lengths), beta=beta)


def dpo_gamma(policy: PairLogps, reference: PairLogps, *, beta: float, reference_strength: float) -> Odds:
    """DPO^gamma: a reward is beta * (log pi - gamma * log pi_ref); gamma, here `reference_strength`, 1 is DPO.

    H-DPO of other parameters: its alpha is 1 / gamma, its beta gamma * beta.
    Source: Chen et al. 2024, arXiv:2405.19534, Eq. 4.
    """
    weakened = PairLogps(*(reference_strength * widen(side) for side in reference))
    return implicit(policy, weakened, beta=beta)


def flex_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, beta_rejected: float) -> Odds:
    """Flex-DPO: a beta for chosen answers and one for rejected ones; DPO-Shift with the factor beta_rejected / beta.

    Source: Yan et al. 2024, arXiv:2406.07327.
    """
    chosen, rejected = rewards(policy, reference, beta=1.0)
    chosen, rejected = beta * chosen, beta_rejected * rejected
    return Odds(chosen - rejected, chosen, rejected)


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, lambda_: float) -> Odds:
    """DPO-Positive: margin - lambda * max(0, -chosen reward); lambda = 0 is DPO.

    A chosen answer that became less likely than under the reference costs the pair its lead.
    Source: Pal et al. 2024, arXiv:2402.13228: the penalty is inside beta.
    """
    odds = implicit(policy, reference, beta=beta)
    return odds._replace(log_odds=odds.log_odds - lambda_ * relu(-odds.chosen_rewards))
