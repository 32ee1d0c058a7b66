"""What is logged, from per-pair tensors: sums over pairs and their count, reduced over all ranks when read.

Means are over pairs, never over packs, steps or ranks, so they do not depend on how a step was split.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lorafocal.objectives import PairLogps, PairLosses
from lorafocal.objectives.focal import focal_ratio_to_dpo, focal_weight, turning_point

KEYS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",  # margin > 0; ties count as wrong here, and apart below
    "rewards/ties",  # margin exactly 0: every pair before the first step
    "logps/chosen",
    "logps/rejected",
    "focal/weight_mean",  # mean of -dL/dmargin
    "focal/ratio_to_dpo",  # mean of that weight over DPO's, pair by pair
    "focal/turned_share",  # pairs below the turning point, where a step lowers the margin
)


def pair_values(losses: PairLosses, policy: PairLogps, *, gamma: float) -> Tensor:
    """The metrics of each pair, (B, len(KEYS)), float64."""
    margin = losses.margins
    columns = (
        losses.losses,
        losses.chosen_rewards,
        losses.rejected_rewards,
        margin,
        margin > 0,
        margin == 0,
        policy.chosen,
        policy.rejected,
        focal_weight(margin, gamma=gamma),
        focal_ratio_to_dpo(margin, gamma=gamma),
        margin < turning_point(gamma),
    )
    return torch.stack([column.detach().double() for column in columns], dim=1)


class PairMetrics:
    """Running sums over pairs on the device, without waiting for it until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self.num_pairs = 0

    def add(self, values: Tensor) -> None:
        """Add the (B, len(KEYS)) values of B pairs."""
        sums = values.sum(0)
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self.num_pairs += values.shape[0]

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks; every rank must call. Empty where there were none."""
        *sums, count = self._totals(device)
        return {key: value / count for key, value in zip(KEYS, sums, strict=True)} if count else {}

    def state(self, device: torch.device) -> dict[str, float]:
        """Sums and count over all ranks as plain numbers, for a checkpoint; every rank must call."""
        *sums, count = self._totals(device)
        return {**dict(zip(KEYS, sums, strict=True)), "num_pairs": int(count)}

    def _totals(self, device: torch.device) -> list[float]:
        """The sums in the order of KEYS, then the count."""
        sums = torch.zeros(len(KEYS), dtype=torch.float64) if self._sums is None else self._sums
        totals = torch.cat((sums.to(device), torch.tensor([self.num_pairs], dtype=torch.float64, device=device)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        return totals.tolist()

    def load(self, state: dict[str, float]) -> None:
        """Take up the sums that `state` wrote: on one rank only, because they are those of all."""
        self.num_pairs = int(state["num_pairs"])
        self._sums = torch.tensor([state[key] for key in KEYS], dtype=torch.float64) if self.num_pairs else None
