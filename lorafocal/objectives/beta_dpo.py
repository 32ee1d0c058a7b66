"""beta-DPO: the step's beta goes by its mean log-ratio margin, and pairs far from the running mean are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, Over, implicit, rewards

_LEAST_BETA = 1e-3  # as the authors clamp
_NONE = 1e-12  # nats: below, margins do not vary, as at a run's start


class _Step(NamedTuple):
    kept: Tensor  # (B,) bool
    beta: Tensor  # ()
    state: Mapping[str, Tensor]


def log_odds(
    policy: PairLogps,
    reference: PairLogps,
    *,
    draws: Tensor,
    state: Mapping[str, Tensor],
    beta: float,
    sensitivity: float,
    filtered_share: float,
    momentum: float,
) -> Odds:
    """The step's beta times h = chosen minus rejected log-ratio, (B,); beta is not differentiated.

    It is beta (1 + sensitivity * (mean h of the kept pairs - running mean of h)), at least 1e-3. Rewards have the
    config's beta. The running mean and standard deviation of h, `mean` and `std` of the state, take the step up before
    it is judged by them: they begin at 0, and keep a share of `momentum` each step.
    Source: Wu et al. 2024, arXiv:2407.08639, with the authors' code: h without a scale, in nats.
    """
    margin = implicit(policy, reference, beta=1.0).log_odds
    step = _step(margin.detach(), draws, state, beta, sensitivity, filtered_share, momentum)
    return Odds(step.beta.to(margin) * margin, *rewards(policy, reference, beta=beta), step.state)


def of_kept(
    losses: Tensor,
    policy: PairLogps,
    reference: PairLogps,
    *,
    draws: Tensor,
    state: Mapping[str, Tensor],
    filtered_share: float,
    momentum: float,
) -> Over:
    """Losses of the kept pairs, scaled up so that the step's mean is theirs; 0 for the others, (B,)."""
    margin = implicit(policy, reference, beta=1.0).log_odds.detach()
    kept = _step(margin, draws, state, 1.0, 0.0, filtered_share, momentum).kept
    return Over(torch.where(kept, losses, 0.0) * (len(losses) / kept.sum().to(losses)))


def _step(
    margin: Tensor,
    draws: Tensor,
    state: Mapping[str, Tensor],
    beta: float,
    sensitivity: float,
    filtered_share: float,
    momentum: float,
) -> _Step:
    margin = margin.double()
    nothing = margin.new_zeros(())
    std = margin.std() if len(margin) > 1 else nothing
    mean = momentum * state.get("mean", nothing) + (1 - momentum) * margin.mean()
    std = momentum * state.get("std", nothing) + (1 - momentum) * std
    kept = _sampled(-0.5 * ((margin - mean) / std.clamp(min=_NONE)).square(), draws, filtered_share)
    beta_of_step = beta * (1 + sensitivity * (margin[kept].mean() - mean))
    return _Step(kept, beta_of_step.clamp(min=_LEAST_BETA), {"mean": mean, "std": std})


def _sampled(log_weights: Tensor, draws: Tensor, filtered_share: float) -> Tensor:
    """Which pairs are kept, (B,) bool: drawn one after the other, without replacement, by their weights.

    The largest of log-weight + Gumbel noise are such a sample (Efraimidis and Spirakis 2006), whatever the order.
    """
    count = max(1, int(len(draws) * (1 - filtered_share) + 1e-9))
    noise = -(-draws.clamp(min=1e-300).log()).log()
    kept = torch.zeros_like(draws, dtype=torch.bool)
    kept[torch.topk(log_weights + noise, count).indices] = True
    return kept
