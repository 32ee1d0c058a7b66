"""IPO: the difference of log-ratios is regressed to a target, so that sure labels do not drive it on for ever.

Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
"""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, PairLosses, average_logps, implicit


def ipo(policy: PairLogps, reference: PairLogps, *, lengths: Tensor, tau: float) -> PairLosses:
    """(h - 1 / (2 tau))^2, h the difference of the mean log-ratios a token of chosen and rejected answer.

    `lengths` (2B,) are completion tokens, chosen first. Rewards are tau * mean log-ratio. The paper prints sums; by its
    authors' word to TRL its results are of means.
    """
    return ipo_sum(average_logps(policy, lengths), average_logps(reference, lengths), tau=tau)


def ipo_sum(policy: PairLogps, reference: PairLogps, *, tau: float) -> PairLosses:
    """(h - 1 / (2 tau))^2 as printed: h is the difference of whole answers' log-ratios. Rewards are tau * log-ratio."""
    h = implicit(policy, reference, beta=1.0)
    losses = (h.log_odds - 1 / (2 * tau)).square()
    scaled = Odds(h.log_odds, tau * h.chosen_rewards, tau * h.rejected_rewards)
    return scaled.with_losses(losses)._replace(log_odds=None)
