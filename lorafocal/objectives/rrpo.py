"""RRPO: DPO of the tokens that two answers do not share, with the chosen answer held near the reference."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps


def divergence(policy: PairLogps, *, divergences: Tensor, alpha: float) -> Tensor:
    """What stands beside: alpha * the sum over the chosen answer's tokens of KL(reference || policy), (B,), nats.

    The log-odds beside which it stands are DPO's of the differing tokens alone (`differing.weights`).
    Source: Sarkar and Etemad 2025, arXiv:2504.12083, and the authors' code, whose data come with the differing phrases
    marked.
    """
    return alpha * divergences[: len(policy.chosen)]
