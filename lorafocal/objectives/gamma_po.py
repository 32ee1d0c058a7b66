"""gamma-PO: a target margin of each pair's own, large where the reward margin is and small where it is in doubt.

Source: Sun et al. 2025, arXiv:2506.03690, with the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, implicit
from lorafocal.objectives.simpo import simpo

_STEPS = 20  # of the exponentiated gradient
_WINDOW = 256  # margins that targets are shared out over, the step's among them
_QUEUE = 2048  # newest margins of the steps before that the rest of the window is drawn from


def gamma_dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    draws: Tensor,
    state: Mapping[str, Tensor],
    beta: float,
    gamma_beta_ratio: float,
    tau: float,
) -> Odds:
    """DPO's log-odds less the pair's target beyond the mean one, (B,): without a `gamma_beta_ratio` they are DPO's."""
    odds = implicit(policy, reference, beta=beta)
    mean = gamma_beta_ratio * beta
    targets, queue = _targets(odds.log_odds.detach(), draws, state, mean, tau)
    return odds._replace(log_odds=odds.log_odds - (targets - mean).to(odds.log_odds), state=queue)


def gamma_simpo(
    policy: PairLogps,
    *,
    lengths: Tensor,
    draws: Tensor,
    state: Mapping[str, Tensor],
    beta: float,
    gamma_beta_ratio: float,
    tau: float,
) -> Odds:
    """SimPO's log-odds with the pair's target in place of the one for all, (B,); a large `tau` is SimPO."""
    odds = simpo(policy, lengths=lengths, beta=beta, gamma_beta_ratio=0.0)
    targets, queue = _targets(odds.log_odds.detach(), draws, state, gamma_beta_ratio * beta, tau)
    return odds._replace(log_odds=odds.log_odds - targets.to(odds.log_odds), state=queue)


def _targets(
    margins: Tensor, draws: Tensor, state: Mapping[str, Tensor], mean: float, tau: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The target of each of the step's reward margins, (B,) float64, `mean` on average over the window, and the state.

    The window is the step's margins and, up to 256, margins drawn from the queue that the steps before have left.
    """
    margins = margins.double()
    queue = state.get("margins", margins[:0])
    window = torch.cat((margins, _drawn(queue, _WINDOW - len(margins), draws)))
    targets = mean * len(window) * _shares(window, mean, tau)[: len(margins)]
    newest = margins[draws.argsort()]  # in an order that packs and ranks do not change
    return targets, {"margins": torch.cat((queue, newest))[-_QUEUE:]}


def _shares(margins: Tensor, mean: float, tau: float) -> Tensor:
    """Shares p of n margins r, (n,), that sum to 1: near the least of mean[-log sigmoid(r - n mean p)] + tau KL(p).

    KL is that to even shares. 20 steps of the exponentiated gradient from there, of rate 0.5 / tau and at most 1.
    """
    even = -torch.full_like(margins, len(margins)).log()
    log_shares = even
    for _ in range(_STEPS):
        targets = mean * (log_shares - even).exp()
        slope = tau * (log_shares - even) + mean * torch.sigmoid(targets - margins)
        log_shares = torch.log_softmax(log_shares - min(0.5 / tau, 1.0) * slope, dim=0)
    return log_shares.exp()


def _drawn(queue: Tensor, count: int, draws: Tensor) -> Tensor:
    """`count` of the queue's margins without replacement, or all; every rank draws the same."""
    if count <= 0 or not len(queue):
        return queue[:0]
    generator = torch.Generator().manual_seed(int(float(draws.min()) * 2**53))
    return queue[torch.randperm(len(queue), generator=generator)[:count].to(queue.device)]
