"""Pictures are drawn without a display, from whatever a run has."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from lorafocal.objectives import build_objective
from lorafocal.objectives.focal import turning_point
from lorafocal.report import plots
from lorafocal.report.panels import PANELS, drawable
from lorafocal.report.plots import DARK, LIGHT, margins_png, overview_png, panel_png, run_colours
from lorafocal.report.read import RunRecord, read_run
from tests.written_run import evaluation_line, pairs, training_line, write_run

TURN = turning_point(0.05)


def pixels(png: bytes) -> np.ndarray:
    """Colours 0 to 255, (height, width, 3)."""
    return (255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).round().astype(int)


def shows(png: bytes, colour: str) -> bool:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((abs(pixels(png) - wanted).max(-1) <= 2).sum() > 20)


def run_of(folder: Path, **changes: float) -> RunRecord:
    judged = {"eval_right_answers": 0.5, "eval_right_answers_low": 0.4, "eval_right_answers_high": 0.6}
    lines = [line(step, **changes) for step in (1, 10, 20) for line in (training_line, evaluation_line)]
    lines += [judged | {"step": step} for step in (1, 20)]
    return read_run(write_run(folder, lines), folder.name)


def test_every_quantity_of_a_whole_run_is_drawn(tmp_path: Path) -> None:
    assert drawable([run_of(tmp_path / "a")]) == list(PANELS)


def test_panels_without_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [{"loss": 0.5, "grad_norm": math.nan, "step": step} for step in (1, 2)]
    record = read_run(write_run(tmp_path / "a", lines, {}), "a")
    assert [panel.name for panel in drawable([record])] == ["loss"]


@pytest.mark.slow
def test_each_run_has_one_colour_on_every_panel(tmp_path: Path) -> None:
    records = [run_of(tmp_path / "a"), run_of(tmp_path / "b", loss=0.4, learning_rate=2e-4, grad_norm=1.0)]
    for theme in (LIGHT, DARK):
        for panel in PANELS:
            png = panel_png(panel, records, theme)
            assert shows(png, theme.back)
            assert shows(png, theme.runs[1]), panel.name
        assert shows(panel_png(PANELS[0], records, theme), theme.runs[0])
        assert not shows(panel_png(PANELS[0], records[:1], theme), theme.runs[1])


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_colours_are_distinct_however_many_runs(count: int) -> None:
    for theme in (LIGHT, DARK):
        assert len(set(run_colours(count, theme))) == count


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out_from_their_background(theme: plots.Theme) -> None:
    """WCAG: 3 to 1 for what is drawn, 4.5 to 1 for what is written."""

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str) -> float:
        light, dark = sorted((luminance(colour), luminance(theme.back)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert min(map(contrast, theme.runs)) >= 3
    assert min(contrast(theme.text), contrast(theme.soft)) >= 4.5


@pytest.mark.slow
def test_a_users_name_is_text_and_not_mathematics(tmp_path: Path) -> None:
    names = ["$\\frac{", "_hidden", "<b>", "x" * 500, "數"]
    record = run_of(tmp_path / "a")
    named = [RunRecord(name, record.lines, record.tables, {}, record.objective) for name in names]
    with pytest.warns(UserWarning, match="Glyph"):
        assert overview_png(named).startswith(b"\x89PNG")
    assert margins_png(named[0], "#0072b2", LIGHT)


def test_margins_need_pairs_and_beta(tmp_path: Path) -> None:
    record = run_of(tmp_path / "a")
    assert shows(margins_png(record, LIGHT.runs[2], LIGHT) or b"", LIGHT.runs[0]) is False
    assert margins_png(RunRecord("a", record.lines, record.tables), "#0072b2", LIGHT) is None
    assert margins_png(RunRecord("a", record.lines, (), {}, record.objective), "#0072b2", LIGHT) is None


def test_the_view_holds_margin_zero_most_pairs_and_the_turning_point_where_it_matters() -> None:
    low, high = plots._view(torch.zeros(10), TURN)
    assert low < 0 < high
    assert high - low < 0.1
    low, high = plots._view(torch.linspace(1.0, 3.0, 2000), TURN)
    assert low < 0
    assert high == pytest.approx(3.0, abs=0.25)
    low, high = plots._view(torch.cat((torch.linspace(0.0, 3.0, 2000), torch.tensor([-25.0]))), TURN)
    assert low < -20


@pytest.mark.slow
@pytest.mark.parametrize("far", [0.0, 1e-12, 25.0, 1e4, 1e12])
def test_margins_of_any_size_are_drawn(tmp_path: Path, far: float) -> None:
    record = read_run(write_run(tmp_path / "a", tables={1: pairs(chosen=[-far, far])}), "a")
    for gamma in (0.0, 0.05, 1.0):
        drawn = replace(record, objective=build_objective("focalpo", beta=0.1, gamma=gamma))
        assert margins_png(drawn, "#0072b2", DARK)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30, 1e300, -1e300, math.nan])
def test_curves_of_any_size_are_drawn(tmp_path: Path, size: float) -> None:
    lines = [training_line(step, loss=size * step) for step in (1, 2, 10**11)]
    assert panel_png(PANELS[0], [read_run(write_run(tmp_path / "a", lines), "a")], LIGHT)
