"""The gate of a merge: held-out pairs under the live adapter and under the merged model as it was written.

Both sides compute in one dtype (float32 unless memory forbids), each with its own weights: the base rounded
to the dtype of training plus the float32 adapter, and the merged weights rounded to the dtype of the output.
So the drift is what merging did to the function, not the noise of bfloat16 arithmetic, which a release pays
anyway and which is measured apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.objectives.inputs import PairLogps
from lorafocal.release.verify import NOISE as FLOAT32_NOISE

# At most a tenth of what was learned may be lost, as 90% of a layer's delta must survive its cast (row 43).
MAX_DRIFT = 0.1


class GateFailure(InputError):
    """The merged model does not do what the adapter does; nothing was published. The message holds the way
    out."""


@dataclass(frozen=True, slots=True)
class GateEvidence:
    """What a gate measured, pair by pair: enough for a stranger to run it again on the merged model's files.

    Log-probs are (B,) nats in float32, in the order of `pairs`: of the live adapter, of its base, and of the merged
    model, all computed in `dtype` (the gate's arithmetic, not what is stored) and in `layout`.
    """

    pairs: tuple[TokenizedPair, ...]
    live: PairLogps
    reference: PairLogps
    merged: PairLogps
    dtype: str
    layout: str


@dataclass(frozen=True, slots=True)
class GateReport:
    """How far the merged model is from the live adapter, over B pairs (2B sequences); in nats unless said.

    `learned_rms`: root mean square of live minus reference log-probs, the effect that must survive.
    `drift_rms`, `drift_mean`, `drift_max`: of merged minus live log-probs (absolute values in mean and max);
    `drift_per_token` is the summed absolute drift over the completion tokens. `margin_drift_mean`,
    `margin_drift_max`: the same of chosen minus rejected. `accuracy_live`, `accuracy_merged`: share of pairs
    whose logratio margin (before beta) is above 0. `rank_flips`: pairs where it has another sign. `noise_rms`:
    the merged model in its own dtype's arithmetic minus itself in the gate's; None where they are one.
    """

    pairs: int
    tokens: int
    dtype: str
    gate_dtype: str
    learned_rms: float
    drift_rms: float
    drift_mean: float
    drift_max: float
    drift_per_token: float
    margin_drift_mean: float
    margin_drift_max: float
    accuracy_live: float
    accuracy_merged: float
    rank_flips: int
    noise_rms: float | None
    max_drift: float
    limit: float

    @property
    def lost(self) -> float:
        """Drift as a share of the learned effect."""
        if self.learned_rms == 0:
            return 0.0 if self.drift_rms == 0 else math.inf
        return self.drift_rms / self.learned_rms

    @property
    def passed(self) -> bool:
        return self.drift_rms <= self.limit < math.inf and self.serves

    @property
    def serves(self) -> bool:
        """Whether the merged model gives numbers at all in its own arithmetic, which float16 may overflow."""
        return self.noise_rms is None or math.isfinite(self.noise_rms)

    @property
    def blind(self) -> bool:
        """Whether the base itself would pass: what was learned is nothing, or too little for float32 to show."""
        return self.learned_rms <= self.limit

    def as_dict(self) -> dict[str, Any]:
        lost = self.lost if math.isfinite(self.lost) else None  # JSON has no infinity
        return {**asdict(self), "lost": lost, "passed": self.passed}

    def table(self) -> str:
        """The numbers for a person, one a line."""
        return gate_table({"": self})


def gate_table(reports: Mapping[str, GateReport]) -> str:
    """The numbers of merges of one adapter side by side, a column each; `reports` by the heading of its column."""
    first = next(iter(reports.values()))
    shared = [
        ("held-out pairs", f"{first.pairs} ({first.tokens} completion tokens)"),
        ("learned effect", f"{first.learned_rms:.4g} nats a sequence (rms of adapter - base)"),
        ("  may be lost", f"{first.limit:.3g} nats ({100 * first.max_drift:.3g}% of the learned effect)"),
    ]
    columns = [_column(report) for report in reports.values()]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    if len(reports) > 1:
        rows.insert(0, ("", list(reports)))
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"{label:<22}{''.join(f'{cell:<{width}}' for cell in cells)}".rstrip() for label, cells in rows]
    return "\n".join([*(f"{label:<22}{value}" for label, value in shared), *lines])


def _column(report: GateReport) -> dict[str, str]:
    mean_and_largest = f"{report.drift_mean:.3g}, {report.drift_max:.3g} nats"
    column = {
        "log-prob drift": f"{report.drift_rms:.3g} nats a sequence = {report.lost:.2%} of it",
        "  mean, largest": f"{mean_and_largest}; {report.drift_per_token:.2g} a token",
        "margin drift": f"{report.margin_drift_mean:.3g} mean, {report.margin_drift_max:.3g} largest",
        "accuracy": f"{report.accuracy_live:.2%} before, {report.accuracy_merged:.2%} merged",
        "rank flips": f"{report.rank_flips} of {report.pairs} pairs",
    }
    if report.noise_rms is not None:
        column[f"served in {report.dtype}"] = f"adds {report.noise_rms:.3g} nats of arithmetic noise"
    return column | {"gate": "passed" if report.passed else "FAILED"}


def compare(
    pairs: Sequence[TokenizedPair],
    *,
    live: PairLogps,
    reference: PairLogps,
    merged: PairLogps,
    served: PairLogps | None,
    dtype: str,
    gate_dtype: str,
    max_drift: float = MAX_DRIFT,
) -> GateReport:
    """Compare the log-probs, (B,) each, of the live adapter, its base, and the merged model (gate and own
    arithmetic).

    The gate passes where rms(merged - live) <= max_drift * rms(live - reference) + 1e-6 * rms(live): the
    drift is measured against the effect it threatens. The last term is float32 rounding, so that an adapter
    that learned nothing can be merged exactly and passes.
    """
    tokens = sum(sum(pair.scored_tokens) for pair in pairs)
    drift = _sequences(merged) - _sequences(live)
    live_margin, merged_margin = _margins(live, reference), _margins(merged, reference)
    margin_drift = (merged_margin - live_margin).abs()
    learned_rms = _rms(_sequences(live) - _sequences(reference))
    return GateReport(
        pairs=len(pairs),
        tokens=tokens,
        dtype=dtype,
        gate_dtype=gate_dtype,
        learned_rms=learned_rms,
        drift_rms=_rms(drift),
        drift_mean=float(drift.abs().mean()),
        drift_max=float(drift.abs().max()),
        drift_per_token=float(drift.abs().sum() / tokens),
        margin_drift_mean=float(margin_drift.mean()),
        margin_drift_max=float(margin_drift.max()),
        accuracy_live=float((live_margin > 0).double().mean()),
        accuracy_merged=float((merged_margin > 0).double().mean()),
        rank_flips=int((live_margin.sign() != merged_margin.sign()).sum()),
        noise_rms=None if served is None else _rms(_sequences(served) - _sequences(merged)),
        max_drift=max_drift,
        limit=max_drift * learned_rms + FLOAT32_NOISE * _rms(_sequences(live)),
    )


def check(report: GateReport, *ways_out: str) -> None:
    """Raise GateFailure unless the report passed (a drift that is not a number fails).

    `ways_out` are those that only the caller knows of; the message names them first.
    """
    if report.passed:
        return
    if not report.serves:
        raise GateFailure(
            f"in {report.dtype} the merged model's log-probs are not finite: it overflows where it computes in what it"
            " is stored in. Nothing was written. Merge with --dtype bfloat16 or float32."
        )
    ways = ["publish the adapter without merging it"]
    if report.dtype != "float32":
        ways.insert(0, "merge with --dtype float32")
    if report.gate_dtype != "float32":
        ways.insert(0, f"gate with --gate-dtype float32 (the noise of {report.gate_dtype} counts as drift)")
    raise GateFailure(
        f"the merged model is not the adapter: on {report.pairs} held-out pairs its log-probs drift by "
        f"{report.drift_rms:.3g} nats a sequence, {100 * report.lost:.3g}% of the learned effect of "
        f"{report.learned_rms:.3g} nats; {100 * report.max_drift:.3g}% is allowed ({report.rank_flips} pairs change "
        f"rank). Nothing was written. Ways out: {', or '.join([*ways_out, *ways])}."
    )


def _sequences(logps: PairLogps) -> Tensor:
    return torch.cat((logps.chosen, logps.rejected)).double()


def _margins(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen, rejected = (_sequences(policy) - _sequences(reference)).chunk(2)
    return chosen - rejected


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
