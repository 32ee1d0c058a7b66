"""What is drawn of a run over its steps: one panel a quantity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafocal.report.numbers import HELD_OUT, displacement_series, gap_series, good_answers
from lorafocal.report.read import RunRecord, Series


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over steps. `kind` is line, dashed, dots or rings (held out), or diamonds; `key` names it there."""

    values: Callable[[RunRecord], Series]
    kind: str = "line"
    key: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes for all runs."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    percent: bool = False
    zero: bool = False  # a line at 0


def _logged(key: str) -> Callable[[RunRecord], Series]:
    return lambda record: record.series(key)


def _moved(side: str, prefix: str = "") -> Callable[[RunRecord], Series]:
    return lambda record: displacement_series(record, side, prefix)


def _two(one: str, other: str, words: tuple[str, str]) -> tuple[Curve, ...]:
    """Two keys of training and held-out pairs, told apart by `words`."""
    return tuple(
        Curve(_logged(prefix + key), kind, word + where)
        for prefix, where, kinds in (("", "", ("line", "dashed")), (HELD_OUT, ", held out", ("dots", "rings")))
        for key, kind, word in zip((one, other), kinds, words, strict=True)
    )


def _judged(name: str) -> Callable[[RunRecord], Series]:
    """A series of `GoodAnswers`; empty where nobody judged."""
    return lambda record: getattr(good_answers(record), name, Series([], []))


def _both(key: str) -> tuple[Curve, ...]:
    return Curve(_logged(key), "line", "training"), Curve(_logged(HELD_OUT + key), "dots", "held out")


PANELS = (
    Panel("loss", "Loss", "nats", _both("loss")),
    Panel("margins", "Reward margin", "chosen minus rejected reward", _both("rewards/margins"), zero=True),
    Panel(
        "accuracies", "Reward accuracy", "share",
        (*_both("rewards/accuracies"), Curve(_judged("share"), "diamonds", "good answers")), percent=True,
    ),
    Panel(
        "answers", "Good answers to held-out prompts", "share",
        (
            Curve(_judged("share"), "diamonds", "by rule, or above the chosen ones"),
            Curve(_judged("low"), "dashed", "95% interval"), Curve(_judged("high"), "dashed", "95% interval"),
        ),
        percent=True,
    ),
    Panel(
        "displacement", "Displacement: policy minus reference", "nats a completion",
        (
            Curve(_moved("chosen"), "line", "chosen"), Curve(_moved("rejected"), "dashed", "rejected"),
            Curve(_moved("chosen", HELD_OUT), "dots", "chosen, held out"),
            Curve(_moved("rejected", HELD_OUT), "rings", "rejected, held out"),
        ),
        zero=True,
    ),
    Panel(
        "ranking", "Ranked right by log-prob", "share of pairs",
        _two("ranking/policy", "ranking/reference", ("policy", "reference")), percent=True,
    ),
    Panel(
        "flips", "Rankings kept, and mended", "share of either part",
        _two("ranking/kept", "ranking/mended", ("kept", "mended")), percent=True,
    ),
    Panel(
        "accuracy_parts", "Reward accuracy by the reference's ranking", "share of either part",
        _two("rewards/accuracies_where_right", "rewards/accuracies_where_wrong", ("right", "wrong")), percent=True,
    ),
    Panel("effective", "Effective share of the pairs", "by weight", _both("focal/effective_share"), percent=True),
    Panel(
        "lengths", "Margin against length difference", "Pearson's correlation",
        _both("rewards/length_correlation"), zero=True,
    ),
    Panel("chosen_fell", "Chosen answers that fell", "share of pairs", _both("focal/chosen_fell_share"), percent=True),
    Panel("gap", "Gap: held-out minus training loss", "nats", (Curve(gap_series, "dots"),), zero=True),
    Panel("learning_rate", "Learning rate", "per step", (Curve(_logged("learning_rate")),)),
    Panel("grad_norm", "Gradient norm, before clipping", "norm", (Curve(_logged("grad_norm")),)),
    Panel("speed", "Speed", "pairs/s", (Curve(_logged("pairs_per_s")),)),
    Panel("memory", "Peak memory", "GiB", (Curve(_logged("peak_gib")),)),
)  # fmt: skip


def drawable(records: Sequence[RunRecord]) -> list[Panel]:
    """The panels that at least one run has numbers for."""
    return [panel for panel in PANELS if any(curve.values(r).finite().steps for curve in panel.curves for r in records)]
