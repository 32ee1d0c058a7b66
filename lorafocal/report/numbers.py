"""What is computed from a run's record: displacement, gap, headline numbers, margins and flips of single pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lorafocal.metrics import answer_columns, loss_gaps, ranks_right, summary
from lorafocal.objectives import Objective
from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import dpo_weight, rewards
from lorafocal.recipes import leaves
from lorafocal.report.read import PairTable, RunRecord, Series

HELD_OUT = "eval_"
LOGGED_AT_THE_END = {  # headlines of held-out pairs, of training pairs where none are held out
    "accuracy_where_right": "rewards/accuracies_where_right",
    "accuracy_where_wrong": "rewards/accuracies_where_wrong",
    "ranking_reference": "ranking/reference",
    "ranking_policy": "ranking/policy",
    "kept": "ranking/kept",
    "mended": "ranking/mended",
    "effective_share": "focal/effective_share",
    "length_correlation": "rewards/length_correlation",
}
RIGHT_ANSWERS, WIN_RATE = "right_answers", "win_rate"  # how keys end that are shares of good answers
JUDGED = {RIGHT_ANSWERS: "right answers by rule", WIN_RATE: "answers above the chosen ones, by reward model,"}


_FELL = "focal/chosen_fell_share"


class Headline(NamedTuple):
    """One row of the table of numbers: key in the JSON output, words, and how to print it."""

    key: str
    words: str
    format: str


HEADLINES = (
    Headline("steps", "optimiser steps", ",.0f"),
    Headline("pairs_seen", "pairs seen", ",.0f"),
    Headline("loss_first", "training loss, first logged (nats)", ".4f"),
    Headline("loss_last", "training loss, last (nats)", ".4f"),
    Headline("held_out_loss", "held-out loss (nats)", ".4f"),
    Headline("gap", "gap: held-out minus training loss (nats)", "+.4f"),
    Headline("margin", "training margin", "+.3f"),
    Headline("held_out_margin", "held-out margin", "+.3f"),
    Headline("accuracy", "training reward accuracy", ".1%"),
    Headline("held_out_accuracy", "held-out reward accuracy", ".1%"),
    Headline("ties", "ties, counted as wrong", ".1%"),
    Headline("accuracy_where_right", "reward accuracy where the reference ranks right", ".1%"),
    Headline("accuracy_where_wrong", "reward accuracy where it ranks wrong", ".1%"),
    Headline("ranking_reference", "ranked right by log-prob, reference", ".1%"),
    Headline("ranking_policy", "ranked right by log-prob, policy", ".1%"),
    Headline("kept", "kept: still right, of those right before", ".1%"),
    Headline("mended", "mended: right now, of those wrong before", ".1%"),
    Headline("right_answers_first", "right answers by rule, first", ".1%"),
    Headline("right_answers_last", "right answers by rule, last", ".1%"),
    Headline("win_rate_first", "answers above the chosen ones by reward model, first", ".1%"),
    Headline("win_rate_last", "answers above the chosen ones by reward model, last", ".1%"),
    Headline("chosen_displacement", "chosen: policy minus reference (nats)", "+.2f"),
    Headline("rejected_displacement", "rejected: policy minus reference (nats)", "+.2f"),
    Headline("chosen_fell_share", "share of chosen that fell", ".1%"),
    Headline("effective_share", "effective share of the pairs, by weight", ".1%"),
    Headline("turned_share", "most pairs past the turning point", ".2%"),
    Headline("length_correlation", "margin against length difference (Pearson)", "+.2f"),
    Headline("pairs_per_s", "speed (pairs/s)", ",.1f"),
    Headline("peak_gib", "peak memory (GiB)", ".2f"),
)


@dataclass(frozen=True, slots=True)
class Displacement:
    """How log-probs of answers changed against the reference, nats a completion, at the end of a run."""

    chosen: float
    rejected: float
    chosen_fell_share: float | None  # share of pairs; None where it was not measured
    pairs: Literal["held-out", "training"]


@dataclass(frozen=True, slots=True)
class Flip:
    """Pairs by the reference's ranking (initially) and the policy's own (finally): right is chosen above rejected."""

    initially_right: bool
    finally_right: bool
    pairs: int
    share: float
    mean_margin: float | None  # the change since the reference, whose margin is 0; None without pairs
    own_weight_share: float | None  # share of the objective's gradient weight on these pairs, where it is not DPO's
    dpo_weight_share: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """The held-out pairs that the reference ranks right, or those that it ranks wrong, at the last evaluation."""

    initially_right: bool
    pairs: int
    finally_right: float  # share that the policy's own log-probs rank right: kept, or mended
    accuracy: float | None  # of the implicit reward; None where beta is unknown
    chosen_displacement: float  # policy minus reference, nats a completion
    rejected_displacement: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GoodAnswers(NamedTuple):
    """Shares of good answers over steps; their 95% interval and change since the first, as far as they were logged."""

    words: str
    share: Series
    low: Series
    high: Series
    change: Series
    change_high: Series


def displacement_series(record: RunRecord, side: str, prefix: str = "") -> Series:
    """Mean of policy minus reference log-prob of `side` (chosen or rejected), nats a completion."""
    policy, reference = (record.series(f"{prefix}logps/{key}") for key in (side, f"reference_{side}"))
    values = dict(zip(*reference, strict=True))
    both = [(step, value - values[step]) for step, value in zip(*policy, strict=True) if step in values]
    return Series([step for step, _ in both], [moved for _, moved in both])


def gap_series(record: RunRecord) -> Series:
    """Held-out minus training loss (nats), as a run says it: of the pairs since the evaluation before."""
    by_step = {int(line["step"]): gap for line, gap in loss_gaps(record.lines) if gap is not None}
    steps = sorted(by_step)
    return Series(steps, [by_step[step] for step in steps])


def at(series: Series, step: int) -> float | None:
    """The last value logged at `step` or before; None where there is none."""
    before = [value for logged, value in zip(*series, strict=True) if logged <= step]
    return before[-1] if before else None


def last(series: Series) -> float | None:
    return series.values[-1] if series.values else None


def at_the_end(record: RunRecord, key: str) -> float | None:
    """What was last logged under `key`: of held-out pairs, of training pairs only where none are held out."""
    return last(record.series(f"{HELD_OUT if record.series(f'{HELD_OUT}loss').steps else ''}{key}"))


def right_answers(record: RunRecord) -> Series:
    """Share of right answers by a rule, from the first key that names them."""
    return record.series(_key_ending(record, RIGHT_ANSWERS))


def wins(record: RunRecord) -> Series:
    """Share of answers that a reward model puts above the chosen ones, from the first key that names it."""
    return record.series(_key_ending(record, WIN_RATE))


def good_answers(record: RunRecord) -> GoodAnswers | None:
    """What the run's judge found; by a rule where there are two. None where nobody judged."""
    for ending, words in JUDGED.items():
        if key := _key_ending(record, ending):
            more = (record.series(f"{key}_{name}") for name in ("low", "high", "change", "change_high"))
            return GoodAnswers(words, record.series(key), *more)
    return None


def _key_ending(record: RunRecord, ending: str) -> str:
    """The first key in the alphabet that ends so; empty where none does."""
    return min((key for line in record.lines for key in line if key.endswith(ending)), default="")


def turned_share(record: RunRecord) -> Series:
    """Larger share of pairs past the turning point, of training and held-out, at each step."""
    both = [record.series(f"{prefix}focal/turned_share") for prefix in ("", HELD_OUT)]
    steps = sorted({step for series in both for step in series.steps})
    by_step = [dict(zip(*series, strict=True)) for series in both]
    return Series(steps, [max(values[step] for values in by_step if step in values) for step in steps])


def displacement(record: RunRecord) -> Displacement | None:
    """At the end of the run: of the last evaluated pairs, else from the log, held-out before training."""
    if record.tables:
        found = summary(answer_columns(record.tables[-1].policy, record.tables[-1].reference))
        chosen, rejected, fell = (found[key] for key in ("displacement/chosen", "displacement/rejected", _FELL))
        return Displacement(chosen, rejected, fell, "held-out")
    sources: tuple[tuple[str, Literal["held-out", "training"]], ...] = ((HELD_OUT, "held-out"), ("", "training"))
    for prefix, pairs in sources:
        chosen_mean, rejected_mean = (
            last(displacement_series(record, side, prefix)) for side in ("chosen", "rejected")
        )
        if chosen_mean is not None and rejected_mean is not None:
            return Displacement(chosen_mean, rejected_mean, last(record.series(f"{prefix}{_FELL}")), pairs)
    return None


def headline(record: RunRecord) -> dict[str, float]:
    """The numbers of HEADLINES that this run has, under their keys."""
    moved, right, won = displacement(record), right_answers(record), wins(record)
    values = {
        "steps": max(line["step"] for line in record.lines),
        "pairs_seen": last(record.series("pairs_seen")),
        "loss_first": next(iter(record.series("loss").values), None),
        "loss_last": last(record.series("loss")),
        "held_out_loss": last(record.series(f"{HELD_OUT}loss")),
        "gap": last(gap_series(record)),
        "margin": last(record.series("rewards/margins")),
        "held_out_margin": last(record.series(f"{HELD_OUT}rewards/margins")),
        "accuracy": last(record.series("rewards/accuracies")),
        "held_out_accuracy": last(record.series(f"{HELD_OUT}rewards/accuracies")),
        "ties": last(record.series("rewards/ties")),
        "right_answers_first": next(iter(right.values), None),
        "right_answers_last": last(right),
        "win_rate_first": next(iter(won.values), None),
        "win_rate_last": last(won),
        "chosen_displacement": moved.chosen if moved else None,
        "rejected_displacement": moved.rejected if moved else None,
        "chosen_fell_share": moved.chosen_fell_share if moved else None,
        "turned_share": max(turned_share(record).values, default=None),
        "pairs_per_s": last(record.series("pairs_per_s")),
        "peak_gib": max(record.series("peak_gib").values, default=None),
        **{name: at_the_end(record, key) for name, key in LOGGED_AT_THE_END.items()},
    }
    return {key: value for key, value in values.items() if value is not None}


def table_margins(table: PairTable, beta: float) -> Tensor:
    """The margin of each pair, (B,)."""
    chosen, rejected = rewards(table.policy, table.reference, beta=beta)
    return chosen - rejected


def first_middle_last(tables: Sequence[PairTable]) -> list[PairTable]:
    """At most three tables: the first, the one nearest half-way in steps, the last."""
    if len(tables) < 3:
        return list(tables)
    half_way = (tables[0].step + tables[-1].step) / 2
    return [tables[0], min(tables[1:-1], key=lambda table: abs(table.step - half_way)), tables[-1]]


def flips(record: RunRecord) -> list[Flip]:
    """The four groups of pairs at the last evaluation; empty where no table of pairs or no beta is known."""
    if not record.tables or record.beta is None:
        return []
    table = record.tables[-1]
    margins = table_margins(table, record.beta)
    initially, finally_ = ranks_right(table.reference), ranks_right(table.policy)
    weights = {"dpo": dpo_weight(margins)}
    if (own := own_weights(record)) is not None:
        weights["own"] = own.weights(margins)
    groups = []
    for before in (True, False):
        for after in (True, False):
            mask = (initially == before) & (finally_ == after)
            count = int(mask.sum())
            shares = {name: share_of(weight, mask) for name, weight in weights.items()}
            mean = float(margins[mask].mean()) if count else None
            groups.append(Flip(before, after, count, count / len(margins), mean, shares.get("own"), shares.get("dpo")))
    return groups


def parts(record: RunRecord) -> list[Part]:
    """Both parts of the held-out pairs at the last evaluation, as far as there are pairs in them."""
    if not record.tables:
        return []
    table = record.tables[-1]
    initially = ranks_right(table.reference)
    return [
        _part(table, mask, right, record.beta) for right, mask in ((True, initially), (False, ~initially)) if mask.any()
    ]


def _part(table: PairTable, mask: Tensor, initially_right: bool, beta: float | None) -> Part:
    policy, reference = (PairLogps(*(side[mask] for side in logps)) for logps in (table.policy, table.reference))
    found = summary(answer_columns(policy, reference, None if beta is None else rewards(policy, reference, beta=beta)))
    return Part(
        initially_right,
        int(mask.sum()),
        found["ranking/policy"],
        found.get("rewards/accuracies"),
        found["displacement/chosen"],
        found["displacement/rejected"],
    )


def own_weights(record: RunRecord) -> Objective | None:
    """The run's objective where its gradient weights are known from margins alone, and are not DPO's."""
    own = record.objective
    if own is None or not own.entry.of_margin:
        return None
    plain = own.entry.logistic and (own.factor is None or own.factor.gamma == 0)
    return None if plain else own


def share_of(weights: Tensor, mask: Tensor) -> float | None:
    """Share of the total weight under `mask`; None where weights of both signs or none make a share meaningless."""
    total = float(weights.sum())
    return float(weights[mask].sum()) / total if total > 0 and float(weights.min()) >= 0 else None


def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values under dotted keys; lists stay whole."""
    return dict(leaves(manifest.get("config", {})))


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
