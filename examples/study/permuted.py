"""The control for *which* pairs FocalPO weighs: its own weights, dealt out to other pairs of the same step.

    L_i = r_pi(i) * -log p_i,   r = p^gamma (1 + gamma log p), detached,   pi a permutation of the step's pairs

r is FocalPO's gradient weight over DPO's (Liu et al., ACL 2025, Eq. 6), so without the permutation this has FocalPO's
gradient exactly. With it every step holds the same multiset of weights, on pairs drawn at random. Importing this file
registers `focalpo-permuted`; do so before lorafocal.config, whose section lists the registry.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lorafocal.objectives import BETA, OBJECTIVES, Entry
from lorafocal.objectives.focal import focal_ratio_to_dpo
from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import dpo_loss, implicit

NAME = "focalpo-permuted"


def weighted(log_odds: Tensor, ratio: Tensor) -> Tensor:
    """The logistic loss times a constant weight, both (B,)."""
    return ratio * dpo_loss(log_odds)


def permuted_ratios(
    policy: PairLogps, reference: PairLogps, *, lengths: Tensor, beta: float, gamma: float
) -> tuple[Tensor]:
    """FocalPO's weights over DPO's at these pairs' margins, (B,), each given to another pair of the pack.

    A pack must be a whole step. The permutation is drawn from the answers' lengths, which tell steps apart and are the
    same on every machine.
    """
    ratio = focal_ratio_to_dpo(implicit(policy, reference, beta=beta).log_odds, gamma=gamma)
    return (ratio[permutation(lengths).to(ratio.device)],)


def permutation(lengths: Tensor) -> Tensor:
    """A permutation of B pairs, (B,) int64, drawn from their answers' lengths, (2B,), alone."""
    digest = hashlib.sha256(",".join(map(str, lengths.tolist())).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(len(lengths) // 2, generator=generator)


ENTRY = Entry(
    {"beta": BETA, "gamma": OBJECTIVES["focalpo"].parameters["gamma"]},
    odds="pairwise.implicit",
    link=weighted,
    constants=permuted_ratios,
    lengths=True,
)
OBJECTIVES[NAME] = ENTRY
