"""EXO on rewards: the policy's shares of all answers to a prompt are drawn to those of a judge's scores."""

from __future__ import annotations

from lorafocal.objectives.inputs import OtherAnswers, PairLogps, PairScores
from lorafocal.objectives.pairwise import PairLosses
from lorafocal.objectives.sets import Sets


def exo_reward(
    policy: PairLogps,
    reference: PairLogps,
    *,
    scores: PairScores,
    others: OtherAnswers | None,
    beta: float,
    score_temperature: float,
) -> PairLosses:
    """KL(q || t), (B,): q is the softmax of beta * log-ratio over a pair's answers, t that of score / temperature.

    The gradient runs through q. Of two answers it is `reward-aware-forward` with eta 1 / score_temperature.
    Source: Ji et al. 2024, arXiv:2402.00856, EXO-rw, with the authors' code (their beta_pi and beta_r).
    """
    answers = Sets.of(policy, reference, scores, others, beta=beta)
    ours = answers.log_softmax(answers.rewards)
    judged = answers.log_softmax(answers.scores / score_temperature).to(ours)
    chosen, rejected = answers.rewards[: 2 * answers.num_sets].detach().chunk(2)
    return PairLosses(answers.total(ours.exp() * (ours - judged)), chosen, rejected)
