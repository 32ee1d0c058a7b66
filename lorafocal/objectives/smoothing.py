"""Losses of log-odds for labels of which some are wrong: each takes the label to be flipped with a known rate."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.pairwise import dpo_loss


def smoothed(log_odds: Tensor, *, label_smoothing: float) -> Tensor:
    """cDPO: -(1-e) log p - e log(1-p), elementwise; lowest where p = 1-e, and e = 0 is DPO.

    Source: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    return (1 - label_smoothing) * dpo_loss(log_odds) + label_smoothing * dpo_loss(-log_odds)


def debiased(log_odds: Tensor, *, label_smoothing: float) -> Tensor:
    """rDPO: (-(1-e) log p + e log(1-p)) / (1-2e), elementwise; over labels flipped with rate e its mean is DPO's loss.

    It falls without bound as log-odds grow: by e/(1-2e) a unit of them. e = 0 is DPO.
    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    kept, flipped = (1 - label_smoothing) * dpo_loss(log_odds), label_smoothing * dpo_loss(-log_odds)
    return (kept - flipped) / (1 - 2 * label_smoothing)
