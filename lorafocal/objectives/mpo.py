"""MPO: all answers to a prompt at once, those above their mean score against the others."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafocal.objectives.inputs import OtherAnswers, PairLogps, PairScores
from lorafocal.objectives.pairwise import Odds, implicit, widen


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

    D is an answer's log-ratio, w = e^(alpha (score - mean score)) of the pair's answers, good is a score above the
    mean. A pair without further answers and alpha 0 has DPO's log-odds. Rewards are the pair's own.
    Source: Gupta et al. 2024, arXiv:2412.04628, its weighted loss as restated in arXiv:2412.16378.
    """
    odds = implicit(policy, reference, beta=beta)
    count = len(odds.log_odds)
    pair = torch.arange(count, device=odds.log_odds.device).repeat(2)
    implied = torch.cat(
        (beta * _logratio(policy.chosen, reference.chosen), beta * _logratio(policy.rejected, reference.rejected))
    )
    judged = torch.cat((scores.chosen, scores.rejected)).double()
    if others is not None and others.reference is not None and others.scores is not None:
        pair = torch.cat((pair, others.pair))
        implied = torch.cat((implied, beta * _logratio(others.logps, others.reference)))
        judged = torch.cat((judged, others.scores.double()))
    above = judged - _of_pairs(judged, pair, count, "mean")[pair]
    good = (above > 0) | (judged >= _of_pairs(judged, pair, count, "amax")[pair])  # the mean may round to the best
    terms = implied + (alpha * above).to(implied)
    log_odds = _logsumexp(terms[good], pair[good], count) - _logsumexp(terms[~good], pair[~good], count)
    return odds._replace(log_odds=log_odds)


def _logratio(policy: Tensor, reference: Tensor) -> Tensor:
    return widen(policy) - widen(reference)


def _of_pairs(values: Tensor, pair: Tensor, count: int, how: str) -> Tensor:
    """(A,) of answers to (count,) of their pairs, each of which has one."""
    return values.new_zeros(count).scatter_reduce(0, pair, values, how, include_self=False)


def _logsumexp(terms: Tensor, pair: Tensor, count: int) -> Tensor:
    largest = _of_pairs(terms.detach(), pair, count, "amax")
    return largest + torch.zeros_like(largest).index_add(0, pair, (terms - largest[pair]).exp()).log()
