"""Relative preference optimisation: each chosen answer of a step against every rejected one, of other prompts too.

Source: Yin et al. 2024, arXiv:2402.10958, with the authors' code. A pair's loss is the mean of its chosen answer's
contrasts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, dpo_loss, rewards


def weighted(policy: PairLogps, reference: PairLogps, *, embeddings: Tensor, beta: float, tau: float) -> PairLosses:
    """Mean over j of -log sigmoid(w_ij (chosen reward i - rejected reward j)), (B,): pairs of alike prompts count.

    w_ij is the softmax over j of -(1 - cosine of the embeddings of prompts i and j) / tau. It multiplies the margin,
    not the loss, so a step of B pairs has margins of the order of 1/B.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    directions = normalize(embeddings.to(chosen), dim=1)
    weights = torch.softmax((directions @ directions.T - 1) / tau, dim=1)
    losses = dpo_loss(weights * (chosen[:, None] - rejected)).mean(1)
    return PairLosses(losses, chosen.detach(), rejected.detach())


def diagonal(policy: PairLogps, reference: PairLogps, *, beta: float, diagonal_weight: float) -> PairLosses:
    """`diagonal_weight` times DPO's loss, and the rest times the mean over other prompts' rejected answers, (B,).

    A pair that is alone in its step has DPO's loss.
    """
    chosen, rejected = rewards(policy, reference, beta=beta)
    contrasts = dpo_loss(chosen[:, None] - rejected)
    own, count = contrasts.diagonal(), len(chosen)
    if count > 1:
        others = (contrasts.sum(1) - own) / (count - 1)
        own = diagonal_weight * own + (1 - diagonal_weight) * others
    return PairLosses(own, chosen.detach(), rejected.detach())
