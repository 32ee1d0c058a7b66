"""The preference term of a Bradley-Terry objective: a loss of the log-odds, and what the focal factor makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FAR = -5.0  # over gamma: from these log-odds down p^gamma turns every gradient round, and soon no float can tell


@dataclass(frozen=True, slots=True)
class PreferenceTerm:
    """Losses of log-odds, both (B,): the link alone, or with a factor around it.

    A link may take constants of the pairs, (B,) each; one with a factor takes none.
    `turning_gamma` is the exponent of a factor p^gamma, which can turn a gradient round, and 0 for every other.
    `clip`: a pair whose gradient the factor turned round gets none; its loss stays what it is.
    """

    link: Callable[..., Tensor]
    factor: Callable[[Tensor, Tensor], Tensor] | None = None  # of the losses and the log-odds
    turning_gamma: float = 0.0
    clip: bool = False

    def __call__(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        losses = self._unclipped(log_odds, *constants)
        return torch.where(self.turned(log_odds), losses.detach(), losses) if self.clip else losses

    def weights(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        """-dL/dlog_odds, (B,), float64, detached: of this very function, by autograd."""
        return _weights(self, log_odds, *constants)

    def turned(self, log_odds: Tensor) -> Tensor:
        """Where the factor turns a pair's gradient round, (B,) bool: against the link's own."""
        if not self.turning_gamma:
            return torch.zeros_like(log_odds, dtype=torch.bool)
        near = log_odds.double().clamp(min=_FAR / self.turning_gamma)
        return _weights(self._unclipped, near).sign() * _weights(self.link, near).sign() < 0

    @property
    def turning_point(self) -> float:
        """The log-odds below which the factor turns every gradient round; -inf where there are none."""
        if not self.turning_gamma:
            return -math.inf
        turned, kept = _FAR / self.turning_gamma, 0.0
        for _ in range(80):  # halvings: as far as float64 goes
            middle = (turned + kept) / 2
            if self.turned(torch.tensor([middle], dtype=torch.float64)).item():
                turned = middle
            else:
                kept = middle
        return kept

    def _unclipped(self, log_odds: Tensor, *constants: Tensor) -> Tensor:
        losses = self.link(log_odds, *constants)
        return losses if self.factor is None else self.factor(losses, log_odds)


def _weights(losses_of: Callable[..., Tensor], log_odds: Tensor, *constants: Tensor) -> Tensor:
    with torch.enable_grad():
        log_odds = log_odds.detach().double().requires_grad_()
        losses = losses_of(log_odds, *(constant.double() for constant in constants))
        return -torch.autograd.grad(losses.sum(), log_odds)[0]
