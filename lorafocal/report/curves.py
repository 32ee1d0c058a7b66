"""`lorafocal curves`: the paper's Figures 2, 3 and 4, computed by the losses that train, as pictures and as numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafocal.bounds import check_gamma
from lorafocal.errors import InputError
from lorafocal.objectives import build_objective
from lorafocal.objectives.focal import focal_loss, focal_weight, focal_weight_terms, hard_loss, turning_point
from lorafocal.objectives.pairwise import dpo_loss, dpo_weight
from lorafocal.publish import check_file, write_atomically
from lorafocal.report.plots import LIGHT, draw_key, dress, new_figure, png_bytes

GAMMA = 0.05  # the paper's
GAMMAS = (0.05, 0.5, 1.0, 2.0)  # of Figure 2; the paper's own are legible in its picture alone
CSV_FILE = "curves.csv"
PROBABILITY, MARGIN = "p, the probability that the pair is ranked right", "margin z"
PANEL_INCHES = (5.2, 3.6)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: `values` at the plot's `x`."""

    name: str
    values: Tensor
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """One set of axes; `x` and every line's values are (N,) float64."""

    title: str
    x_name: str
    y_name: str
    x: Tensor
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of the paper, by its number there."""

    number: int
    plots: tuple[Plot, ...]


@dataclass(frozen=True, slots=True)
class CurvesReport:
    """What FocalPO's weight does at `gamma`, and the files."""

    gamma: float
    facts: dict[str, float]
    files: tuple[Path, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"gamma": self.gamma, **self.facts, "files": [str(file) for file in self.files]}

    def table(self) -> str:
        """The facts, one a line, and where the files are."""
        lines = [f"{'gamma':<40}{self.gamma:g}", *(f"{name:<40}{value:.6g}" for name, value in self.facts.items())]
        return "\n".join([*lines, *(f"written  {file}" for file in self.files)])


def write_curves(out: Path, *, gamma: float = GAMMA) -> CurvesReport:
    """Draw the three figures into the folder `out`, and their numbers into curves.csv there.

    Raises InputError for a `gamma` that cannot train, and where `out` cannot be written.
    """
    check_gamma(gamma)
    if gamma == 0:
        raise InputError("gamma 0 is DPO, and every curve would be DPO's: give a gamma above 0")
    drawings = (figure_2(), figure_3(gamma), figure_4(gamma))
    files: dict[str, bytes] = {f"figure-{drawing.number}.png": picture(drawing) for drawing in drawings}
    files[CSV_FILE] = csv_text(drawings).encode()
    _check_place(out, files)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):  # the table first: it tells whose the pictures are
            write_atomically(out / name, files[name])
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    return CurvesReport(gamma, facts(gamma), tuple(out / name for name in files))


def _check_place(out: Path, files: Mapping[str, bytes]) -> None:
    """Refuse (`InputError`) a folder where files of these names are not earlier curves: their table tells."""
    taken = [out / name for name in files if (out / name).exists()]
    for path in taken:
        check_file(path)
    header = files[CSV_FILE].splitlines()[0]
    if taken and (out / CSV_FILE not in taken or not (out / CSV_FILE).read_bytes().startswith(header)):
        raise InputError(f"{taken[0]} would be replaced, and is not of earlier curves; choose another --out")


def facts(gamma: float) -> dict[str, float]:
    """Where FocalPO's gradient weight is highest and where it turns round; at the start; the loss's bound."""
    margin = torch.linspace(-60, 20, 800_001, dtype=torch.float64)
    weight = focal_weight(margin, gamma=gamma)
    highest = int(weight.argmax())
    nought = torch.zeros((), dtype=torch.float64)
    start, turn = focal_weight(nought, gamma=gamma), torch.tensor(turning_point(gamma), dtype=torch.float64)
    return {
        "weight at the start (margin 0)": float(start),
        "over DPO's there": float(start / dpo_weight(nought)),
        "margin of the highest weight": float(margin[highest]),
        "highest weight": float(weight[highest]),
        "margin below which a step turns round": float(turn),
        "highest loss, at that margin": float(focal_loss(turn, gamma=gamma)),
    }


def figure_2(gammas: Sequence[float] = GAMMAS) -> Drawing:
    """Loss over p: the hard emphasis (1-p)^gamma on the left, FocalPO's p^gamma on the right; DPO dashed in both."""
    p = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    margin = torch.logit(p)
    dpo = Line("DPO", dpo_loss(margin), dashed=True)
    kinds = (("(1-p)^gamma: hard pairs emphasised", hard_loss), ("p^gamma: FocalPO", focal_loss))
    plots = (
        Plot(
            title, PROBABILITY, "loss (nats)", p, (dpo, *(_line(gamma, loss(margin, gamma=gamma)) for gamma in gammas))
        )
        for title, loss in kinds
    )
    return Drawing(2, tuple(plots))


def figure_3(gamma: float) -> Drawing:
    """FocalPO's gradient weight as the sum of the paper's two terms (Eq. 6), beside DPO's."""
    margin = _margins()
    first, second = focal_weight_terms(margin, gamma=gamma)
    lines = (
        Line("DPO: 1-p", dpo_weight(margin), dashed=True),
        Line("(1-p) p^gamma", first),
        Line("gamma (1-p) p^gamma log p", second),
        Line("FocalPO: their sum", focal_weight(margin, gamma=gamma)),
    )
    return Drawing(3, (Plot(f"weight in the gradient, gamma {gamma:g}", MARGIN, "-dL/dz", margin, lines),))


def figure_4(gamma: float) -> Drawing:
    """Gradient weights of DPO, FocalPO and the hard emphasis with exponent 1."""
    margin = _margins()
    hard = build_objective("focal-hard", beta=1.0, gamma=1.0).weights(margin)
    lines = (
        Line("DPO", dpo_weight(margin), dashed=True),
        Line(f"FocalPO, p^{gamma:g}", focal_weight(margin, gamma=gamma)),
        Line("(1-p)^1", hard),
    )
    return Drawing(4, (Plot("weight in the gradient", MARGIN, "-dL/dz", margin, lines),))


def picture(drawing: Drawing) -> bytes:
    """The figure as a PNG."""
    width, height = PANEL_INCHES
    figure = new_figure((width * len(drawing.plots), height), LIGHT)
    for axes, plot in zip(figure.subplots(1, len(drawing.plots), squeeze=False)[0], drawing.plots, strict=True):
        dress(axes, LIGHT)
        for line, colour in zip(plot.lines, (LIGHT.soft, *LIGHT.runs), strict=False):
            axes.plot(plot.x, line.values, label=line.name, color=colour, linestyle="--" if line.dashed else "-")
        axes.set_title(plot.title, fontsize=10, loc="left", color=LIGHT.text)
        axes.set_xlabel(plot.x_name, fontsize=9, color=LIGHT.text)
        axes.set_ylabel(plot.y_name, fontsize=9, color=LIGHT.text)
        draw_key(axes, LIGHT)
    return png_bytes(figure)


def csv_text(drawings: Sequence[Drawing]) -> str:
    """A line a point: figure, plot, curve, x, value; numbers that read back to the same bits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("figure", "plot", "curve", "x_is", "x", "value"))
    writer.writerows(_points(drawings))
    return buffer.getvalue()


def _points(drawings: Sequence[Drawing]) -> Iterator[tuple[object, ...]]:
    for drawing in drawings:
        for plot in drawing.plots:
            for line in plot.lines:
                for x, value in zip(plot.x.tolist(), line.values.tolist(), strict=True):
                    yield drawing.number, plot.title, line.name, plot.x_name, x, value


def _line(gamma: float, values: Tensor) -> Line:
    return Line(f"gamma {gamma:g}", values)


def _margins() -> Tensor:
    return torch.linspace(-30, 10, 401, dtype=torch.float64)
