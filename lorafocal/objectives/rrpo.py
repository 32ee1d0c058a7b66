"""RRPO: DPO of the tokens that two answers do not share, with the chosen answer held near the reference."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps


def weights(policy_tokens: Tensor, *, differs: Tensor) -> Tensor:
    """1 where a token `differs`, else 0, (N,): the log-odds are DPO's of the differing tokens alone."""
    return differs.to(policy_tokens)


def divergence(policy: PairLogps, *, divergences: Tensor, alpha: float) -> Tensor:
    """What stands beside: alpha * the sum over the chosen answer's tokens of KL(reference || policy), (B,), nats.

    Source: Sarkar and Etemad 2025, arXiv:2504.12083, and the authors' code, whose data come with the differing phrases
    marked.
    """
    return alpha * divergences[: len(policy.chosen)]
