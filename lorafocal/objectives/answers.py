"""What further answers add to a preference term: a gold answer's likelihood, a rationale's, the optimism of exploring.

Where a pair has several, theirs are summed.
"""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import OtherAnswers, PairLogps
from lorafocal.objectives.pairwise import Odds, average_logps, dpo_loss, widen


def triple_po_length(policy: PairLogps, *, lengths: Tensor, beta: float, target_margin: float) -> Odds:
    """TPO-L's log-odds: margin - target_margin, a reward being beta * mean log-prob of an answer's tokens.

    `lengths` (2B,) are completion tokens, chosen first. The target is of the log-odds, as the paper's own code has it:
    SimPO's `gamma_beta_ratio` is this over beta.
    Source: Saeidi et al. 2024, arXiv:2405.16681, TPO-L.
    """
    chosen, rejected = (beta * average for average in average_logps(policy, lengths))
    return Odds(chosen - rejected - target_margin, chosen, rejected)


def likelihood(policy: PairLogps, *, others: OtherAnswers, nll_weight: float) -> Tensor:
    """Triple PO's term of the gold answer: nll_weight * -log pi(gold) in nats a token, (B,).

    Source: Saeidi et al. 2024, arXiv:2405.16681; the mean is what the paper's own code computes of one pair.
    """
    return _of_pairs(-nll_weight * widen(others.logps) / others.lengths, others, policy)


def rationale(policy: PairLogps, *, others: OtherAnswers, rationale_scale: float) -> Tensor:
    """RDPO's term of the rationale: -log sigmoid(rationale_scale * log pi(rationale)), summed log-probs, (B,).

    Source: Just et al. 2024, arXiv:2407.14477, as the paper's own code has it (gamma there).
    """
    return _of_pairs(dpo_loss(rationale_scale * widen(others.logps)), others, policy)


def optimism(policy: PairLogps, *, others: OtherAnswers, alpha: float) -> Tensor:
    """XPO's term: alpha * log pi(y), (B,), for an answer y that the reference sampled: what it says is made rarer.

    Source: Xie et al. 2024, arXiv:2405.21046, Algorithm 1.
    """
    return _of_pairs(alpha * widen(others.logps), others, policy)


def exploration(policy: PairLogps, *, others: OtherAnswers, alpha: float, beta: float) -> Tensor:
    """SELM's term: alpha * beta * (log pi(y) - log pi_ref(y)), (B,), for an answer y that the policy sampled.

    The sign is that of the paper's own code, which lowers the reward of what the policy says already.
    Source: Zhang et al. 2024, arXiv:2405.19332.
    """
    assert others.reference is not None  # the registry asks for a reference
    return _of_pairs(alpha * beta * (widen(others.logps) - widen(others.reference)), others, policy)


def _of_pairs(terms: Tensor, others: OtherAnswers, policy: PairLogps) -> Tensor:
    """(M,) summed over each pair's further answers, (B,)."""
    return terms.new_zeros(len(policy.chosen)).index_add(0, others.pair, terms)
