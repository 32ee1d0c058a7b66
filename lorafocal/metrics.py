"""What is measured of pairs: means over all of them for the log, and a table of each for the report.

Means are over pairs, never over packs, steps or ranks, so they do not depend on how a step was split. Only scalars of
pairs are kept: no logits, no per-token values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lorafocal.evaluations import EvaluatedPair
from lorafocal.objectives import Objective
from lorafocal.objectives.pairwise import PairLogps, PairLosses, dpo_weight
from lorafocal.tensor_files import check_keys

CHOSEN_KEYS = ("loss", "logps/chosen")
PAIR_KEYS = (
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",  # margin > 0; ties count as wrong here, and apart below
    "rewards/ties",  # margin exactly 0: every pair before the first step
)
REFERENCE_KEYS = (
    "logps/reference_chosen",
    "logps/reference_rejected",
    "focal/chosen_fell_share",  # pairs whose chosen answer is less likely than under the reference
)
ODDS_KEYS = (
    "focal/weight_mean",  # mean of -dL/dlog_odds
    "focal/ratio_to_dpo",  # mean of that weight over DPO's at the same log-odds, pair by pair
    "focal/turned_share",  # pairs past a turning point, where the factor makes a step lower the log-odds
)
_LIMIT = 500.0  # from these log-odds on DPO's weight would soon be 0, and no ratio to it a number


def metric_keys(objective: Objective) -> tuple[str, ...]:
    """What is logged under `objective`: nothing is made up for answers or a reference that it does not look at."""
    entry = objective.entry
    return CHOSEN_KEYS + PAIR_KEYS * entry.rejected + REFERENCE_KEYS * entry.reference + ODDS_KEYS * entry.bradley_terry


def pair_values(
    objective: Objective,
    losses: PairLosses,
    policy: PairLogps,
    reference: PairLogps | None = None,
) -> Tensor:
    """The metrics of each pair, (B, len(metric_keys(objective))), float64."""
    columns = [losses.losses, policy.chosen]
    if objective.entry.rejected:
        margin = losses.margins
        columns += [policy.rejected, losses.chosen_rewards, losses.rejected_rewards, margin, margin > 0, margin == 0]
    if reference is not None:
        columns += [reference.chosen, reference.rejected, policy.chosen < reference.chosen]
    if losses.log_odds is not None:
        log_odds = losses.log_odds.double().clamp(max=_LIMIT)
        weight = objective.weights(log_odds, *losses.constants)
        columns += [weight, weight / dpo_weight(log_odds), objective.turned(log_odds)]
    return torch.stack([column.detach().double() for column in columns], dim=1)


class PairMetrics:
    """Running sums over pairs on the device, without waiting for it until they are read."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self.num_pairs = 0

    def add(self, values: Tensor) -> None:
        """Add the (B, len(keys)) values of B pairs."""
        sums = values.sum(0)
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self.num_pairs += values.shape[0]

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks; every rank must call. Empty where there were none."""
        *sums, count = self._totals(device)
        return {key: value / count for key, value in zip(self.keys, sums, strict=True)} if count else {}

    def state(self, device: torch.device) -> dict[str, float]:
        """Sums and count over all ranks as plain numbers, for a checkpoint; every rank must call."""
        *sums, count = self._totals(device)
        return {**dict(zip(self.keys, sums, strict=True)), "num_pairs": int(count)}

    def _totals(self, device: torch.device) -> list[float]:
        """The sums in the order of `keys`, then the count."""
        sums = torch.zeros(len(self.keys), dtype=torch.float64) if self._sums is None else self._sums
        totals = torch.cat((sums.to(device), torch.tensor([self.num_pairs], dtype=torch.float64, device=device)))
        return summed_over_ranks(totals).tolist()

    def load(self, state: dict[str, float]) -> None:
        """Take up the sums that `state` wrote: on one rank only, because they are those of all.

        Raises InputError where they are those of other metrics.
        """
        check_keys(state, (*self.keys, "num_pairs"), "state.json: metrics")
        self.num_pairs = int(state["num_pairs"])
        self._sums = torch.tensor([state[key] for key in self.keys], dtype=torch.float64) if self.num_pairs else None


class PairTable:
    """Four log-probs of each pair of a data set, filled by all ranks: 40 bytes a pair."""

    def __init__(self, num_pairs: int, device: torch.device) -> None:
        self._values = torch.zeros(num_pairs, 4, dtype=torch.float64, device=device)

    def add(self, places: Sequence[int], policy: PairLogps, reference: PairLogps) -> None:
        """The log-probs of B pairs; `places` are their places in the data set."""
        self._values[list(places)] = torch.stack((*policy, *reference), dim=1).detach().double()

    def rows(self, ids: Sequence[str]) -> list[EvaluatedPair]:
        """All pairs in the order of the data set, whose ids are given; every rank must call."""
        table = summed_over_ranks(self._values.clone()).tolist()
        return [EvaluatedPair(name, *values) for name, values in zip(ids, table, strict=True)]


def summed_over_ranks(values: Tensor) -> Tensor:
    """`values`, summed in place over all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
