"""MPO: all answers to a prompt at once, those above their mean score against the others."""

from __future__ import annotations

import torch

from lorafocal.objectives.inputs import OtherAnswers, PairLogps, PairScores
from lorafocal.objectives.pairwise import Odds, implicit
from lorafocal.objectives.sets import Sets


def mpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    scores: PairScores,
    others: OtherAnswers | None,
    beta: float,
    alpha: float,
) -> Odds:
    """Log-odds that the answer is one of the good ones, (B,): p = sum of good w e^(beta D) over that of all answers.

    D is an answer's log-ratio, w = e^(alpha |score - mean score|) of the pair's answers, good is a score above the
    mean: answers far from the mean weigh more, very bad ones too. A pair without further answers has DPO's log-odds.
    Rewards are the pair's own.
    Source: Gupta et al. 2024, arXiv:2412.04628, the weight of bad answers by its words ("better or worse than the
    average"): the printed one could not be read. Its authors restate it in arXiv:2412.16378 with score - mean for all.
    """
    answers = Sets.of(policy, reference, scores, others, beta=beta)
    above = answers.scores - answers.mean(answers.scores)[answers.pair]
    best, worst = answers.largest(answers.scores)[answers.pair], -answers.largest(-answers.scores)[answers.pair]
    # The mean of nearly equal scores may round to the best of them, or beyond the worst.
    good = ((above > 0) & (answers.scores > worst)) | (answers.scores >= best)
    terms = answers.rewards + (alpha * above.abs()).to(answers.rewards)
    log_odds = answers.logsumexp(terms.masked_fill(~good, -torch.inf)) - answers.logsumexp(
        terms.masked_fill(good, -torch.inf)
    )
    return implicit(policy, reference, beta=beta)._replace(log_odds=log_odds)
