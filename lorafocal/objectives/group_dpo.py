"""Group-robust DPO: groups of pairs that are learnt worse weigh more, so that the worst group is served too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafocal.objectives.pairwise import Over


def worst_groups(losses: Tensor, *, groups: Tensor, num_groups: int, state: Mapping[str, Tensor], eta: float) -> Over:
    """sum_g q_g L_g, L_g the mean loss of the step's pairs of group g, shared out over the pairs, (B,).

    q_g grows with exp(eta L_g) each step, this one included, from 1/G on, and sums to 1 over all G groups; it is no
    part of the gradient. `state` has it as `log_weights`, (G,). A group without pairs in the step has L_g = 0.
    Source: Ramesh et al. 2024, arXiv:2405.20304, Algorithm 1, with the authors' code (GR-DPO), whose `eta` is of losses
    summed over the batch and over the group's share of the data, unless `divide_by_totalcount` is off: as here.
    """
    counts = torch.bincount(groups, minlength=num_groups)
    means = losses.new_zeros(num_groups).index_add(0, groups, losses) / counts.clamp(min=1)
    before = state.get("log_weights", losses.new_zeros(num_groups, dtype=torch.float64))
    log_weights = torch.log_softmax(before + eta * means.detach().double(), dim=0)
    weights = (log_weights.exp() / counts.clamp(min=1)).to(losses)[groups]
    return Over(losses * weights * len(losses), {"log_weights": log_weights})
