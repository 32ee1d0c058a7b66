"""What pairwise objectives share: log-probs of pairs, rewards, log-odds, and the logistic loss of these (DPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorafocal.objectives.inputs import PairLogps


class PairLosses(NamedTuple):
    """Per-pair results of an objective; rewards are detached, and (0,) where an objective has none."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) beta * logratio where there is a reference, else what it ranks answers by
    rejected_rewards: Tensor  # (B,)
    log_odds: Tensor | None = None  # (B,) detached: of chosen being preferred; None without a Bradley-Terry form
    constants: tuple[Tensor, ...] = ()  # (B,) each, detached: what weights of log-odds depend on beside these
    state: Mapping[str, Tensor] | None = None  # what the step leaves to the next, where an objective has a state
    scale: Tensor | None = None  # (B,) detached: slope of the step's summed loss towards a pair's own; None is 1

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected reward, (B,)."""
        return self.chosen_rewards - self.rejected_rewards


class Odds(NamedTuple):
    """What a Bradley-Terry objective says of B pairs: the chosen answer is preferred with p = sigmoid(log_odds)."""

    log_odds: Tensor  # (B,) differentiable
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    state: Mapping[str, Tensor] | None = None  # as `PairLosses` has it

    def with_losses(self, losses: Tensor, constants: tuple[Tensor, ...] = ()) -> PairLosses:
        """These pairs with their losses, (B,)."""
        chosen, rejected = self.chosen_rewards.detach(), self.rejected_rewards.detach()
        return PairLosses(losses, chosen, rejected, self.log_odds.detach(), constants, self.state)


class Over(NamedTuple):
    """What an objective makes of a step's losses, each of them B pairs' own."""

    losses: Tensor  # (B,) their mean is the step's loss
    state: Mapping[str, Tensor] | None = None  # as `PairLosses` has it


def rewards(policy: PairLogps, reference: PairLogps, *, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards beta * (log pi - log pi_ref) of chosen and rejected, each (B,), fp32 or wider.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 5 without the partition term, which cancels in margins.
    """
    chosen = beta * (widen(policy.chosen) - widen(reference.chosen))
    rejected = beta * (widen(policy.rejected) - widen(reference.rejected))
    return chosen, rejected


def implicit(policy: PairLogps, reference: PairLogps, *, beta: float) -> Odds:
    """DPO's log-odds: the margin of the implicit rewards."""
    chosen, rejected = rewards(policy, reference, beta=beta)
    return Odds(chosen - rejected, chosen, rejected)


def average_logps(policy: PairLogps, lengths: Tensor) -> PairLogps:
    """Mean log-probability a completion token, (B,) each, in nats; `lengths` (2B,) tokens, chosen first."""
    chosen, rejected = lengths.split(len(policy.chosen))
    return PairLogps(widen(policy.chosen) / chosen, widen(policy.rejected) / rejected)


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """DPO: -log sigmoid(margin).

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    odds = implicit(policy, reference, beta=beta)
    return odds.with_losses(dpo_loss(odds.log_odds))


def dpo_loss(log_odds: Tensor) -> Tensor:
    """-log sigmoid(log_odds), elementwise: the logistic loss, DPO's of the margin."""
    return -logsigmoid(log_odds)


def dpo_weight(margin: Tensor) -> Tensor:
    """-dL/dmargin of DPO, 1 - sigmoid(margin), elementwise."""
    return torch.sigmoid(-margin)


def widen(logps: Tensor) -> Tensor:
    """Log-probs in at least fp32: bf16 is 2 nats coarse at 300 nats."""
    return logps.to(torch.promote_types(logps.dtype, torch.float32))
