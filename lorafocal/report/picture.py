"""One picture of one or more runs: loss, margin, accuracy, and what became of chosen and rejected answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorafocal.errors import InputError

PANELS = (
    ("loss", "loss (nats)", ("loss",)),
    ("margin", "reward margin", ("rewards/margins",)),
    ("reward accuracy", "share of pairs", ("rewards/accuracies",)),
    ("log-probs: chosen (solid), rejected (dashed)", "nats a completion", ("logps/chosen", "logps/rejected")),
)


def draw_runs(runs: Mapping[str, Path], out: Path) -> Path:
    """Draw the training curves of each run's `metrics.jsonl`, labelled by the mapping's keys, into a PNG.

    Raises InputError for a file that is missing or holds no training line.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, no global state
    logs = {label: training_lines(path) for label, path in runs.items()}
    for axes, (title, unit, keys) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, logs, keys)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def training_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file that report training steps (not evaluation, not the closing summary)."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; a run writes its metrics.jsonl into its run folder")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    training = [line for line in lines if "loss" in line]
    if not training:
        raise InputError(f"{path} holds no training step yet")
    return training


def _panel(axes: Axes, logs: Mapping[str, list[dict[str, float]]], keys: tuple[str, ...]) -> None:
    for number, (label, lines) in enumerate(logs.items()):
        steps = [line["step"] for line in lines]
        width = 1.2 + 1.8 * (len(logs) - 1 - number)  # equal curves stay visible behind one another
        for key, style in zip(keys, ("-", "--"), strict=False):
            shown = label if style == "-" else None
            axes.plot(steps, [line[key] for line in lines], style, color=f"C{number}", label=shown, linewidth=width)
