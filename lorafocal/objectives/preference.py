"""The preference term of a Bradley-Terry objective: a loss of the log-odds, and what the focal factor makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FAR = -5.0  # times 1/gamma: every gradient that a factor p^gamma turns round is turned there


@dataclass(frozen=True, slots=True)
class PreferenceTerm:
    """Losses of log-odds, both (B,): the link alone, or with a factor around it.

    A link may take constants of the pairs, (B,) each; one with a factor takes none.
    `clip`: a pair whose gradient the factor turned round gets none; its loss stays what it is.
    """

    link: Callable[..., Tensor]
    factor: Callable[[Tensor, Tensor], Tensor] | None = None  # of the losses and the log-odds
    clip: bool = False

    def __call__(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        losses = self._unclipped(log_odds, *constants)
        return torch.where(self.turned(log_odds), losses.detach(), losses) if self.clip else losses

    def weights(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        """-dL/dlog_odds, (B,), float64, detached: of this very function, by autograd."""
        return _weights(self, log_odds, *constants)

    def turned(self, log_odds: Tensor) -> Tensor:
        """Where the factor turns a pair's gradient round, (B,) bool; nowhere without a factor."""
        if self.factor is None:
            return torch.zeros_like(log_odds, dtype=torch.bool)
        return _weights(self._unclipped, log_odds).sign() * _weights(self.link, log_odds).sign() < 0

    def _unclipped(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        losses = self.link(log_odds, *constants)
        return losses if self.factor is None else self.factor(losses, log_odds)


def lowest_unturned(term: PreferenceTerm, gamma: float) -> float:
    """The log-odds below which p^gamma turns the gradients of `term` round; -inf where gamma is 0."""
    if gamma == 0:
        return -math.inf
    turned, kept = _FAR / gamma, 0.0
    for _ in range(80):
        middle = (turned + kept) / 2
        if term.turned(torch.tensor([middle], dtype=torch.float64)).item():
            turned = middle
        else:
            kept = middle
    return kept


def _weights(losses_of: Callable[..., Tensor], log_odds: Tensor, *constants: Tensor) -> Tensor:
    with torch.enable_grad():
        log_odds = log_odds.detach().double().requires_grad_()
        losses = losses_of(log_odds, *(constant.double() for constant in constants))
        return -torch.autograd.grad(losses.sum(), log_odds)[0]
