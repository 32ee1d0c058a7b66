"""What is measured of pairs: means over all of them for the log, and a table of each for the report.

Only scalars of pairs are kept, and they are added up over packs, steps and ranks: no logits, no per-token values. What
is no mean over all pairs (a share of some of them, a correlation) is made of the whole sums in `logged`, and so, like a
mean, does not depend on how a step was split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorafocal.evaluations import EvaluatedPair
from lorafocal.objectives import Objective
from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, dpo_weight
from lorafocal.tensor_files import check_keys
from lorafocal.together import grouped

PAIRS = "num_pairs"
MOMENTS = {  # added up to make something else of, and not logged themselves
    "up_where_right", "margins_squared", "leads", "leads_squared", "margins_by_leads", "weights_squared",
}  # fmt: skip
WEIGHT_KEYS = (
    "focal/weight_mean",  # mean of -dL/dlog_odds
    "focal/ratio_to_dpo",  # mean of that weight over DPO's at the same log-odds, pair by pair
    "focal/turned_share",  # pairs past a turning point, where the factor makes a step lower the log-odds
    "weights_squared",
)
_ROUNDING = 1e-9  # a variance below this share of the mean square is what rounding leaves of none


def ranks_right(logps: PairLogps) -> Tensor:
    """Whether a model itself finds the chosen answer likelier, (B,); a tie is not right."""
    return logps.chosen > logps.rejected


def answer_columns(
    policy: PairLogps,
    reference: PairLogps | None = None,
    rewards: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> dict[str, Tensor]:
    """What is added up of B pairs' answers, by name, (B,) each, as far as it can be told from what is given.

    `rewards` are those of chosen and rejected answers, (B,) each; `lengths` (2B,) their tokens, chosen first.
    """
    columns = _likelihood_columns(policy, reference)
    if rewards is None:
        return columns
    columns |= _reward_columns(*rewards)
    if reference is not None:
        columns["up_where_right"] = columns["rewards/accuracies"] & columns["ranking/reference"]
    if lengths is not None:
        columns |= _length_columns(columns["rewards/margins"], lengths)
    return columns


def _likelihood_columns(policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
    right = ranks_right(policy)
    columns = {"logps/chosen": policy.chosen, "logps/rejected": policy.rejected, "ranking/policy": right}
    if reference is None:
        return columns
    right_before = ranks_right(reference)
    return columns | {
        "logps/reference_chosen": reference.chosen,
        "logps/reference_rejected": reference.rejected,
        "focal/chosen_fell_share": policy.chosen < reference.chosen,
        "ranking/reference": right_before,
        "ranking/lost": right_before & ~right,
        "ranking/won": right & ~right_before,
    }


def _reward_columns(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    margin = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": margin > 0,  # a tie counts as wrong here, and apart below
        "rewards/ties": margin == 0,  # as every pair is before the first step
    }


def _length_columns(margin: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    margin, (chosen, rejected) = margin.double(), lengths.double().chunk(2)
    lead = chosen - rejected
    return {
        "margins_squared": margin.square(),
        "leads": lead,
        "leads_squared": lead.square(),
        "margins_by_leads": margin * lead,
    }


def weight_columns(
    objective: Objective, log_odds: Tensor, *constants: Tensor, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """What is added up of the weights that the objective gives B pairs of these log-odds, (B,), by WEIGHT_KEYS.

    `constants` and `scale` are those of `PairLosses`.
    """
    near = bounded(log_odds)
    weight = objective.weights(near, *constants)
    weight = weight if scale is None else weight * scale.double()
    columns = weight, weight / dpo_weight(near), objective.turned(near), weight.square()
    return dict(zip(WEIGHT_KEYS, columns, strict=True))


def bounded(log_odds: Tensor) -> Tensor:
    """Log-odds in float64, at most 500: soon after DPO's weight would be 0, and no ratio to it a number."""
    return log_odds.double().clamp(max=500.0)


def pair_values(
    objective: Objective, losses: PairLosses, policy: PairLogps, reference: PairLogps | None, lengths: Tensor
) -> Tensor:
    """What is added up of B pairs, (B, len(sum_keys(objective))), float64.

    `lengths` (2B + M,) are tokens, chosen first; those of M further answers are passed over. Nothing is made up for
    answers or a reference that the objective does not look at.
    """
    if not objective.entry.rejected:
        columns = [losses.losses, policy.chosen]
    else:
        rewards = losses.chosen_rewards, losses.rejected_rewards
        own = lengths[: 2 * len(policy.chosen)]
        columns = [losses.losses, *answer_columns(policy, reference, rewards, own).values()]
    if losses.log_odds is not None:
        columns += weight_columns(objective, losses.log_odds, *losses.constants, scale=losses.scale).values()
    return torch.stack([column.detach().double() for column in columns], dim=1)


def sum_keys(objective: Objective) -> tuple[str, ...]:
    """The names of `pair_values`' columns."""
    entry, none = objective.entry, torch.zeros(0)
    if not entry.rejected:
        return "loss", "logps/chosen"
    logps = PairLogps(none, none)
    answers = answer_columns(logps, logps if entry.reference else None, (none, none), none)
    return "loss", *answers, *WEIGHT_KEYS * entry.bradley_terry


def logged(sums: Mapping[str, float], count: float) -> dict[str, float]:
    """What the log says of `count` pairs with these sums of their columns; empty where there are none.

    What has no value for these pairs, such as the share of none of them, is left out.
    """
    if not count:
        return {}
    means = {key: value / count for key, value in sums.items() if key not in MOMENTS}
    return means | {key: value for key, value in _made(sums, count).items() if value is not None}


def summary(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """What the log would say of the B pairs with these columns, (B,) each."""
    sums = {key: float(column.double().sum()) for key, column in columns.items()}
    return logged(sums, len(columns["logps/chosen"]))


def _made(sums: Mapping[str, float], count: float) -> dict[str, float | None]:
    """What is no mean over all pairs, as far as there are sums for it."""
    made: dict[str, float | None] = {}
    if "ranking/reference" in sums:
        right = sums["ranking/reference"]
        made = {
            "displacement/chosen": (sums["logps/chosen"] - sums["logps/reference_chosen"]) / count,
            "displacement/rejected": (sums["logps/rejected"] - sums["logps/reference_rejected"]) / count,
            "ranking/kept": _over(right - sums["ranking/lost"], right),
            "ranking/mended": _over(sums["ranking/won"], count - right),
        }
        if "up_where_right" in sums:
            up = sums["up_where_right"]
            made["rewards/accuracies_where_right"] = _over(up, right)
            made["rewards/accuracies_where_wrong"] = _over(sums["rewards/accuracies"] - up, count - right)
    if "margins_squared" in sums:
        moments = ("rewards/margins", "margins_squared", "leads", "leads_squared", "margins_by_leads")
        made["rewards/length_correlation"] = _correlation(count, *(sums[key] for key in moments))
    if "weights_squared" in sums:
        made["focal/effective_share"] = effective_share(count, sums["focal/weight_mean"], sums["weights_squared"])
    return made


def effective_share(count: float, total: float, squares: float) -> float | None:
    """Share of `count` pairs that, weighing alike, would make as steady a mean as pairs of these weights do.

    (sum w)^2 / (n sum w^2) of weights with the sums `total` and `squares`: 1 where all weigh alike, 1 / n where one has
    all the weight. None without any weight. Source: Kish 1965, Survey Sampling.
    """
    return None if squares == 0 else min(1.0, total**2 / (count * squares))


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _correlation(count: float, x: float, xx: float, y: float, yy: float, xy: float) -> float | None:
    """Pearson's, from sums; None where either does not vary, and for two points, which are always on a line."""
    of_x, of_y = xx - x * x / count, yy - y * y / count
    if count < 3 or not (of_x > _ROUNDING * xx and of_y > _ROUNDING * yy):
        return None
    return max(-1.0, min(1.0, (xy - x * y / count) / math.sqrt(of_x * of_y)))


def loss_gaps(history: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float | None]]:
    """Each evaluation with its held-out loss minus the mean training loss of the pairs since the evaluation before.

    `history` holds the logged lines of a run in order, as the trainer or `metrics.jsonl` keeps them. None where no
    training loss was logged between the two; one that follows at once is compared with the same pairs.
    """
    evaluated, loss_sum, pairs, seen = False, 0.0, 0, 0
    for line in history:
        if "pairs_seen" in line and "loss" in line:
            if evaluated:
                evaluated, loss_sum, pairs = False, 0.0, 0
            new, seen = line["pairs_seen"] - seen, line["pairs_seen"]
            loss_sum, pairs = loss_sum + line["loss"] * new, pairs + new
        if "eval_loss" in line:
            evaluated = True
            yield line, line["eval_loss"] - loss_sum / pairs if pairs else None


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
        """What is logged of the pairs of all ranks; every rank must call. Empty where there were none."""
        *sums, count = self._totals(device)
        return logged(dict(zip(self.keys, sums, strict=True)), count)

    def state(self, device: torch.device) -> dict[str, float]:
        """Sums and count over all ranks as plain numbers, for a checkpoint; every rank must call."""
        *sums, count = self._totals(device)
        return {**dict(zip(self.keys, sums, strict=True)), PAIRS: int(count)}

    def _totals(self, device: torch.device) -> list[float]:
        """The sums in the order of `keys`, then the count."""
        sums = torch.zeros(len(self.keys), dtype=torch.float64) if self._sums is None else self._sums
        totals = torch.cat((sums.to(device), torch.tensor([self.num_pairs], dtype=torch.float64, device=device)))
        return summed_over_ranks(totals).tolist()

    def load(self, state: dict[str, float]) -> None:
        """Take up the sums that `state` wrote: on one rank only, because they are those of all.

        Raises InputError where they are those of other metrics, such as another version's.
        """
        check_keys(state, (*self.keys, PAIRS), "state.json: metrics")
        self.num_pairs = int(state[PAIRS])
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
    if grouped():
        dist.all_reduce(values)
    return values
