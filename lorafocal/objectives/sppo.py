"""SPPO: the log-ratio of each answer is regressed to how often it wins, for itself and not against its partner."""

from __future__ import annotations

from lorafocal.objectives.inputs import PairLogps, PairScores
from lorafocal.objectives.pairwise import PairLosses, rewards, widen


def sppo(policy: PairLogps, reference: PairLogps, *, scores: PairScores, beta: float) -> PairLosses:
    """(D_w - (P_w - 1/2) / beta)^2 + (D_l - (P_l - 1/2) / beta)^2: log-ratios D, and the scores P, how often each wins.

    beta is the paper's 1 / eta. Its code halves the sum, TRL's does not, and neither does this.
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 (Algorithm 1).
    """
    wins = PairScores(*(widen(side).to(widen(policy.chosen)) for side in scores))
    chosen, rejected = rewards(policy, reference, beta=1.0)
    losses = (chosen - (wins.chosen - 0.5) / beta).square() + (rejected - (wins.rejected - 0.5) / beta).square()
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """The same where the chosen answer always wins and the rejected one never: no scores."""
    won = policy.chosen.detach().new_ones(policy.chosen.shape)
    return sppo(policy, reference, scores=PairScores(won, 0 * won), beta=beta)
