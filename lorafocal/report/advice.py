"""`lorafocal advise`: from the margins that a run reached, whether FocalPO would weigh its pairs otherwise than DPO.

AdamW takes any constant scale of the loss out of its steps, so a smaller mean weight alone changes nothing. What can
change a run is how the weight is spread over pairs: `moved`, the share of it that lies on other pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.metrics import bounded, effective_share
from lorafocal.objectives import build_objective
from lorafocal.objectives.pairwise import dpo_weight
from lorafocal.report.numbers import table_margins
from lorafocal.report.read import PairTable, RunRecord, read_runs

GAMMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PAPER = 0.05  # the paper's gamma
DIFFERS = 0.05  # from this share of moved weight on we say that FocalPO is not DPO; a convention
MANY_TURNED = 0.001  # from this share of turned pairs on training warns


@dataclass(frozen=True, slots=True)
class GammaRow:
    """What FocalPO's gradient weights would be at one gamma, beside DPO's on the same margins."""

    gamma: float
    weight_over_dpo: float  # mean weight over DPO's mean weight
    effective_share: float  # (sum w)^2 / sum w^2, over the pairs
    turned_share: float  # pairs past the turning point, whose margin a step lowers
    correlation: float | None  # Pearson's, with DPO's weights; None where either does not vary
    moved: float  # total variation between both, each summing to 1 in absolute value


@dataclass(frozen=True, slots=True)
class RunAdvice:
    """One run's margins at its last evaluation, and what each gamma would make of them."""

    run: str
    step: int
    pairs: int
    beta: float
    margin_mean: float
    margin_deviation: float  # standard deviation over pairs
    dpo_effective_share: float
    gammas: tuple[GammaRow, ...]

    @property
    def advice(self) -> str:
        """Will FocalPO differ from DPO on this data, and from which gamma on: in plain words."""
        if self.margin_mean == 0 == self.margin_deviation:
            return (
                "Every margin is 0, as before the first step: all pairs weigh alike under DPO and FocalPO. Ask again"
                " of an evaluation after training"
            )
        paper = min(self.gammas, key=lambda row: abs(row.gamma - PAPER))
        linked = "" if paper.correlation is None else f", and its weights correlate {paper.correlation:.4f} with DPO's"
        said = [
            f"At gamma {paper.gamma:g} FocalPO {_verdict(paper)} from DPO on these pairs: {paper.moved:.1%} of the"
            f" gradient's weight moves to other pairs{linked}"
        ]
        first = next((row for row in self.gammas if row.moved >= DIFFERS), None)
        if first is None:
            said.append(
                f"no gamma up to {self.gammas[-1].gamma:g} makes it differ: margins this narrow (a larger beta widens"
                " them) give the factor nothing to tell pairs apart by"
            )
        elif first != paper:
            said.append(f"it differs from gamma {first.gamma:g} on ({first.moved:.1%} moves)")
        turned = next((row for row in self.gammas if row.turned_share > MANY_TURNED), None)
        if turned is not None:
            said.append(
                f"from gamma {turned.gamma:g} on pairs are pushed the wrong way ({turned.turned_share:.1%} of them)"
            )
        return "; ".join(said)

    def table(self) -> str:
        """The margins, a line a gamma, and the advice."""
        head = (
            f"{self.run}: {self.pairs} held-out pairs after step {self.step}, beta {self.beta:g}; margins"
            f" {self.margin_mean:.3g} +- {self.margin_deviation:.3g}"
        )
        titles = f"{'gamma':>7} {'weight/DPO':>11} {'effective':>10} {'turned':>8} {'correlation':>12} {'moved':>7}"
        dpo = f"{'DPO':>7} {1:>11.4f} {self.dpo_effective_share:>10.1%} {0:>8.2%} {'1.0000':>12} {0:>7.1%}"
        rows = [
            f"{row.gamma:>7g} {row.weight_over_dpo:>11.4f} {row.effective_share:>10.1%} {row.turned_share:>8.2%}"
            f" {'-' if row.correlation is None else f'{row.correlation:.4f}':>12} {row.moved:>7.1%}"
            for row in self.gammas
        ]
        return "\n".join([head, titles, dpo, *rows, f"{self.advice}."])

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "advice": self.advice}


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found for each run."""

    runs: tuple[RunAdvice, ...]

    def table(self) -> str:
        """For a person: a block a run, and what the columns are."""
        legend = (
            "effective: share of the pairs that carry the gradient; turned: pairs whose margin a step lowers; moved:"
            " share of\nthe gradient's weight on other pairs than under DPO. AdamW ignores a constant scale, so"
            " `moved` is what matters."
        )
        return "\n\n".join([*(run.table() for run in self.runs), legend])

    def as_dict(self) -> dict[str, Any]:
        """The same for a program; what does not exist is null."""
        return {"runs": [run.as_dict() for run in self.runs]}


def advise(folders: Sequence[Path], *, gammas: Sequence[float] = GAMMAS) -> Advice:
    """Read the margins of each run's last evaluation, and say what FocalPO would make of them at each gamma.

    Margins are the run's implicit rewards, chosen minus rejected, whatever objective reached them. Raises InputError
    for a folder that holds no run, and for a run without a table of its held-out pairs or without a beta per nat.
    """
    if not gammas or any(gamma <= 0 for gamma in gammas):
        raise InputError("gammas: give one or more above 0; gamma 0 is DPO")
    return Advice(tuple(_of_run(record, sorted(gammas)) for record in read_runs(folders)))


def _of_run(record: RunRecord, gammas: Sequence[float]) -> RunAdvice:
    table, beta = _last_table(record)
    margins = table_margins(table, beta)
    return RunAdvice(
        run=record.name,
        step=table.step,
        pairs=len(margins),
        beta=beta,
        margin_mean=float(margins.mean()),
        margin_deviation=float(margins.std(correction=0)),
        dpo_effective_share=share_of_weights(dpo_weight(bounded(margins))),
        gammas=tuple(gamma_row(margins, gamma) for gamma in gammas),
    )


def _last_table(record: RunRecord) -> tuple[PairTable, float]:
    """The last evaluation and the scale of its rewards. Raises InputError where there are no margins per nat."""
    objective = record.objective
    if objective is not None and not objective.entry.implicit_rewards:
        raise InputError(
            f"{record.name} was trained by {objective.name}, whose rewards are not beta times the log-ratios of whole"
            " answers: FocalPO's margins are not known of it. Advise on a run of DPO or FocalPO, a short one will do"
        )
    if not record.tables or record.beta is None:
        raise InputError(
            f"{record.name} has no evaluation of single pairs, or its beta is unknown: train with data.held_out or"
            " data.eval, which leaves one at every evaluation"
        )
    return record.tables[-1], record.beta


def gamma_row(margins: Tensor, gamma: float) -> GammaRow:
    """FocalPO's weights beside DPO's on `margins`, (B,)."""
    margins = bounded(margins)
    objective = build_objective("focalpo", beta=1.0, gamma=gamma)
    dpo, focal = dpo_weight(margins), objective.weights(margins)
    return GammaRow(
        gamma=gamma,
        weight_over_dpo=float(focal.mean() / dpo.mean()),
        effective_share=share_of_weights(focal),
        turned_share=float(objective.turned(margins).double().mean()),
        correlation=correlation(focal, dpo),
        moved=float((focal / focal.abs().sum() - dpo / dpo.sum()).abs().sum() / 2),
    )


def share_of_weights(weights: Tensor) -> float:
    """The effective share of pairs of these weights, (B,)."""
    weights = weights / weights.abs().max()  # squares of tiny ones would be 0
    return effective_share(len(weights), float(weights.sum()), float(weights.square().sum())) or 0.0


def correlation(first: Tensor, second: Tensor) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if min(float(side.max() - side.min()) for side in (first, second)) == 0:
        return None
    return float(torch.corrcoef(torch.stack((first, second)))[0, 1])


def _verdict(row: GammaRow) -> str:
    if row.moved >= DIFFERS:
        return "will differ"
    return "will hardly differ" if row.moved < DIFFERS / 2 else "will differ little"
