"""DMPO: of an answer of several turns the earlier ones weigh more."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(
    policy_tokens: Tensor, *, sequence: Tensor, lengths: Tensor, turns: Tensor | None, turn_discount: float
) -> Tensor:
    """g^j (1 - g^(T-j)) / (1 - g^T) of the tokens of turn j of T, (N,), with g the `turn_discount`; (T-j) / T at 1.

    T is the answer's own. The first turn weighs 1, so an answer of one turn is DPO's.

    Source: Shi et al. 2024, arXiv:2406.14868; swt-user/DMPO.
    """
    if turns is None:
        return torch.ones_like(policy_tokens)
    of_answer = (turns[lengths.cumsum(0) - 1] + 1)[sequence].to(policy_tokens)
    turn = turns.to(policy_tokens)
    if turn_discount == 1:
        return (of_answer - turn) / of_answer
    decay = math.log(turn_discount)
    return (turn * decay).exp() * torch.expm1((of_answer - turn) * decay) / torch.expm1(of_answer * decay)
