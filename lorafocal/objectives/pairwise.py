"""Pairwise objectives of four sequence log-probabilities, and the margin they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """Summed completion log-probabilities of B pairs under one model, in nats."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


class PairScores(NamedTuple):
    """A judge's scores of B pairs' answers, on the judge's own scale; higher is better."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


class PairLosses(NamedTuple):
    """Per-pair results of an objective; rewards are detached, and (0,) where an objective has none."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) what the objective ranks answers by: beta * logratio where it has a reference
    rejected_rewards: Tensor  # (B,)

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected reward, (B,)."""
        return self.chosen_rewards - self.rejected_rewards


def rewards(policy: PairLogps, reference: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards beta * (log pi - log pi_ref) of chosen and rejected, each (B,), fp32 or wider.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 5 without the partition term, which cancels in margins.
    """
    chosen = beta * (widen(policy.chosen) - widen(reference.chosen))
    rejected = beta * (widen(policy.rejected) - widen(reference.rejected))
    return chosen, rejected


def pair_losses(
    policy: PairLogps, reference: PairLogps, *, beta: float, loss_of_margin: Callable[[Tensor], Tensor]
) -> PairLosses:
    """Apply a loss of the margin, (B,) -> (B,), to the implicit rewards."""
    chosen, rejected = rewards(policy, reference, beta=beta)
    return PairLosses(loss_of_margin(chosen - rejected), chosen.detach(), rejected.detach())


def average_logps(policy: PairLogps, lengths: Tensor) -> PairLogps:
    """Mean log-probability a completion token, (B,) each, in nats; `lengths` (2B,) tokens, chosen first."""
    chosen, rejected = lengths.split(len(policy.chosen))
    return PairLogps(widen(policy.chosen) / chosen, widen(policy.rejected) / rejected)


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """DPO: -log sigmoid(margin).

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    return pair_losses(policy, reference, beta=beta, loss_of_margin=dpo_loss)


def dpo_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(margin), elementwise."""
    return -logsigmoid(margin)


def dpo_weight(margin: Tensor) -> Tensor:
    """-dL/dmargin of DPO, 1 - sigmoid(margin), elementwise."""
    return torch.sigmoid(-margin)


def widen(logps: Tensor) -> Tensor:
    """Log-probs in at least fp32: bf16 is 2 nats coarse at 300 nats."""
    return logps.to(torch.promote_types(logps.dtype, torch.float32))
