"""ORPO: supervised tuning on the chosen answer with a pull between the odds of both; no reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, average_logps


def orpo(policy: PairLogps, *, lengths: Tensor, lambda_: float) -> PairLosses:
    """-log p_w - lambda * log sigmoid(log odds(p_w) - log odds(p_l)), with log p the mean over an answer's tokens.

    `lengths` (2B,) are completion tokens, chosen first. Rewards are lambda * log p. The likelihood is that of the
    answer given its prompt, as in the paper.
    Source: Hong et al. 2024, arXiv:2403.07691, Eqs. 4 to 7.
    """
    chosen, rejected = average_logps(policy, lengths)
    odds_ratio = log_odds(chosen) - log_odds(rejected)
    losses = -chosen - lambda_ * logsigmoid(odds_ratio)
    return PairLosses(losses, lambda_ * chosen.detach(), lambda_ * rejected.detach())


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, elementwise; a p that rounds to 1 counts as the last number below it."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # Each form of log(1 - p) is exact where the other cancels.
    likely = logps > -math.log(2)
    complement = torch.where(likely, torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps)))
    return logps - complement
