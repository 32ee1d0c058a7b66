"""Choosing among the settings of a sweep: means over seeds, what cannot be told apart, what a person reads."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafocal.evaluations import EvaluatedPair, evaluation_file, write_evaluation
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.report.plots import DARK, LIGHT
from lorafocal.report.sweep_page import SweepReport, at_the_edge, csv_text, page, run_rows, setting_rows, write_sweep
from lorafocal.report.sweep_plot import drawable, is_logarithmic, lines_of, sweep_png
from lorafocal.report.sweep_results import (
    ACCURACY,
    LOSS,
    Criterion,
    Point,
    SweepRecord,
    choose,
    number_word,
    pair_scores,
    settings,
)

LR, GAMMA, SEED = "training.learning_rate", "objective.gamma", "training.seed"
STEPS = 3
OBJECTIVE = {"name": "focalpo", "beta": 0.1, "gamma": 0.05}


def point(values: Mapping[str, Any], loss: float, accuracy: float = 0.5, **changes: Any) -> Point:
    slug = "-".join(str(value) for value in values.values())
    held_out = {LOSS: loss, ACCURACY: accuracy, "eval_logps/chosen": -9.0, "eval_logps/reference_chosen": -10.0}
    return replace(Point(slug, values, slug, "finished", "", STEPS, held_out), **changes)


def record(points: Sequence[Point], folder: Path = Path("nowhere"), key: str = LOSS) -> SweepRecord:
    axes = {axis: list(dict.fromkeys(p.values[axis] for p in points)) for axis in points[0].values}
    return SweepRecord("toy", folder, Criterion(key, "because"), axes, OBJECTIVE, points)


def over_seeds(losses: Mapping[float, Sequence[float]]) -> list[Point]:
    return [point({LR: lr, SEED: n}, loss) for lr, found in losses.items() for n, loss in enumerate(found)]


# --- choosing -----------------------------------------------------------------------------------------------


def test_the_lowest_loss_and_the_highest_accuracy_are_best() -> None:
    points = [point({LR: lr}, loss, accuracy) for lr, loss, accuracy in ((1e-6, 0.6, 0.7), (2e-6, 0.5, 0.6))]
    chosen = [choose(record(points, key=key)) for key in (LOSS, ACCURACY)]
    assert [choice.point.slug for choice in chosen if choice] == ["2e-06", "1e-06"]


def test_seeds_are_averaged_before_the_best_is_chosen() -> None:
    points = over_seeds({1e-6: [0.50, 0.70], 2e-6: [0.55, 0.57]})  # the luckiest run belongs to the worse setting
    choice = choose(record(points))
    assert choice is not None
    assert (choice.setting.values, choice.point.values[SEED]) == ({LR: 2e-6}, 0)
    assert choice.setting.mean(LOSS) == pytest.approx(0.56)
    assert choice.setting.spread(LOSS) == pytest.approx(math.sqrt(2) * 0.01)


def test_the_order_of_data_counts_as_a_seed() -> None:
    points = [point({LR: lr, "training.data_seed": n}, 0.5) for lr in (1e-6, 2e-6) for n in range(3)]
    assert [len(setting.points) for setting in settings(points)] == [3, 3]


@pytest.mark.parametrize("status", ["failed", "waiting", "interrupted", "refused"])
def test_a_setting_is_not_chosen_by_the_seeds_that_survived(status: Any) -> None:
    lucky, broken = over_seeds({1e-6: [0.1, 0.1]})
    points = [lucky, replace(broken, status=status, held_out={}), *over_seeds({2e-6: [0.5, 0.6]})]
    choice = choose(record(points))
    assert choice is not None
    assert choice.setting.values == {LR: 2e-6}
    assert choose(record(points[:2])) is None


def test_a_loss_that_is_no_number_is_never_best() -> None:
    points = [point({LR: 1e-6}, math.nan), point({LR: 2e-6}, 0.6)]
    choice = choose(record(points))
    assert choice is not None
    assert choice.point.values[LR] == 2e-6


# --- what cannot be told apart ------------------------------------------------------------------------------


def test_equal_settings_are_level_and_the_first_is_named() -> None:
    points = [point({LR: lr}, 0.5, 0.75) for lr in (3e-6, 1e-6, 2e-6)]
    choice = choose(record(points, key=ACCURACY))
    assert choice is not None
    assert choice.point.values[LR] == 3e-6
    assert [rival.setting.values[LR] for rival in choice.level] == [1e-6, 2e-6]
    assert "exactly equal; the first one given is named" in SweepReport(record(points, key=ACCURACY), choice).table()


@pytest.mark.parametrize(("spread", "level"), [(0.001, 0), (0.2, 1)])
def test_seeds_that_scatter_more_than_settings_differ_leave_them_level(spread: float, level: int) -> None:
    losses = {1e-6: [0.5 - spread, 0.5 + spread], 2e-6: [0.52 - spread, 0.52 + spread]}
    choice = choose(record(over_seeds(losses)))
    assert choice is not None
    assert len(choice.level) == level
    if choice.level:
        error = math.sqrt(2 * 2 * spread**2 / 2)  # variance over n - 1 = 1 of two seeds, over two, of two settings
        assert choice.level[0].error == pytest.approx(error)


def write_pairs(folder: Path, one: Point, margins: Sequence[float]) -> None:
    """The table that a run's last evaluation leaves: pairs whose log-ratios differ by `margins` nats."""
    rows = [EvaluatedPair(str(n), -10.0 + margin, -12.0, -10.0, -12.0) for n, margin in enumerate(margins)]
    write_evaluation(evaluation_file(folder / one.slug, STEPS), rows)


def test_the_error_of_a_difference_is_that_of_the_pairs_themselves(tmp_path: Path) -> None:
    points = [point({LR: lr}, 0.0, accuracy) for lr, accuracy in ((1e-6, 0.75), (2e-6, 0.5))]
    for one, margins in zip(points, ([1.0, 1.0, -1.0, 1.0], [1.0, -1.0, -1.0, 1.0]), strict=True):
        write_pairs(tmp_path, one, margins)
    choice = choose(record(points, tmp_path, ACCURACY))
    assert choice is not None
    [rival] = choice.level
    differences = torch.tensor([0.0, -1.0, 0.0, 0.0])
    assert rival.difference == pytest.approx(-0.25)
    assert rival.error == pytest.approx(float(differences.std()) / 2)


def test_a_small_but_steady_advantage_on_the_same_pairs_is_told_apart(tmp_path: Path) -> None:
    """Pairs are far more different from one another than two settings are on one pair."""
    base = torch.linspace(-5.0, 5.0, 20)
    points = []
    for lr, gain in ((1e-6, 0.0), (2e-6, 0.2)):
        margins = (base + gain).tolist()
        losses = build_objective("focalpo", beta=0.1, gamma=0.05)(
            PairLogps(torch.tensor(margins), torch.zeros(20)), PairLogps(torch.zeros(20), torch.zeros(20))
        ).losses
        points.append(point({LR: lr}, float(losses.mean())))
        write_pairs(tmp_path, points[-1], margins)
        scores = pair_scores(points[-1], record(points, tmp_path))
        assert scores is not None
        assert torch.allclose(scores.float(), losses, atol=1e-6)
    choice = choose(record(points, tmp_path))
    assert choice is not None
    assert (choice.point.values[LR], choice.level) == (2e-6, ())


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"),
    [(3e-7, "3e-7"), (1.5e-4, "1.5e-4"), (5e-4, "5e-4"), (1e-3, "0.001"), (0.05, "0.05"), (1.0, "1"), (2e7, "2e7")],
)  # fmt: skip
def test_numbers_read_as_people_write_them(value: float, word: str) -> None:
    assert (number_word(value), float(number_word(value))) == (word, value)


def test_the_table_has_a_row_a_setting_and_the_verdict_below() -> None:
    broken = point({LR: 1e-2, SEED: 0}, 0.0, status="failed", reason="step 3 was stopped\nand more", held_out={})
    points = [*over_seeds({1e-6: [0.6, 0.62], 2e-6: [0.5, 0.52], 3e-6: [0.7, 0.72]}), broken]
    sweep = record(points)
    text = SweepReport(sweep, choose(sweep)).table()
    assert "7 runs: 6 finished, 1 failed" in text
    assert "2e-6 (best)     2/2  0.5100 ± 0.0141" in text
    assert "best     learning_rate 2e-6: eval_loss 0.5100 ± 0.0141 over 2 seeds" in text
    assert "failed   0.01-0: step 3 was stopped" in text
    assert "and more" not in text
    assert "its own value flatters it" in text


def test_losses_of_different_objectives_are_not_shown_side_by_side() -> None:
    points = [point({GAMMA: gamma}, 0.6 - gamma) for gamma in (0.0, 0.1)]
    assert not any("loss" in name for name in setting_rows(record(points, key=ACCURACY), None)[0])
    assert any("loss" in name for name in setting_rows(record([point({LR: 1e-6}, 0.6)]), None)[0])


@pytest.mark.parametrize(
    ("losses", "said"), [((0.5, 0.6, 0.7), "smallest"), ((0.6, 0.5, 0.7), None), ((0.7, 0.6, 0.5), "largest")]
)
def test_a_best_value_at_the_edge_of_what_was_tried_is_told(losses: Sequence[float], said: str | None) -> None:
    sweep = record([point({LR: lr}, loss) for lr, loss in zip((1e-6, 2e-6, 3e-6), losses, strict=True)])
    choice = choose(sweep)
    assert choice is not None
    told = at_the_edge(sweep, choice)
    assert (told is None) if said is None else (told is not None and said in told)


def test_of_two_values_the_best_is_always_at_an_end_and_nothing_is_told() -> None:
    sweep = record([point({LR: lr}, loss) for lr, loss in ((1e-6, 0.5), (2e-6, 0.6))])
    choice = choose(sweep)
    assert choice is not None
    assert at_the_edge(sweep, choice) is None


def test_the_csv_reads_back_to_every_number() -> None:
    points = over_seeds({1e-6: [0.1 + 0.2], 2e-6: [0.5]})
    points.append(point({LR: 3e-6, SEED: 0}, 0.0, status="failed", reason='a, "b"\nc', held_out={}))
    rows = list(csv.DictReader(io.StringIO(csv_text(record(points)))))
    assert [float(row[LR]) for row in rows] == [1e-6, 2e-6, 3e-6]
    assert [row[LOSS] for row in rows] == ["0.30000000000000004", "0.5", ""]
    assert rows[2]["reason"] == 'a, "b"\nc'


def test_the_page_escapes_what_runs_bring() -> None:
    points = [point({"adapter.init": "<script>"}, 0.5, status="failed", reason="<img src=x>", held_out={})]
    text = page(record(points), None, b"", b"")
    assert "<script>" not in text
    assert "<img src=x>" not in text
    assert "&lt;script&gt;" in text


def test_runs_of_the_page_carry_status_and_reason() -> None:
    head, rows = run_rows(record([point({LR: 1e-6}, 0.5, status="failed", reason="bad", held_out={})]))
    assert rows == [["1e-06", "1e-6", "failed: bad"]]
    assert head == ["run", "learning_rate", "status"]


def test_one_line_a_value_of_the_other_axes_and_seeds_become_its_spread() -> None:
    grid = itertools.product((1e-6, 2e-6), (0.0, 0.1), (1, 2))
    points = [point({LR: lr, GAMMA: gamma, SEED: seed}, 0.5) for lr, gamma, seed in grid]
    lines = lines_of(record(points))
    assert list(lines) == ["gamma 0", "gamma 0.1"]
    assert [[value for value, _ in line] for line in lines.values()] == [[1e-6, 2e-6]] * 2
    assert all(len(setting.points) == 2 for line in lines.values() for _, setting in line)


def test_where_seeds_are_all_that_varies_each_run_is_a_dot() -> None:
    lines = lines_of(record([point({SEED: seed}, 0.5) for seed in (1, 2, 3)]))
    assert [[value for value, _ in line] for line in lines.values()] == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("key", "values", "logarithmic"),
    [
        (LR, [3e-7, 5e-7], True), ("adapter.r", [8, 64], True), ("adapter.r", [8, 16], False),
        (GAMMA, [0.0, 0.1], False), ("adapter.init", ["default", "pissa"], False), (LR, [], False),
    ],
)  # fmt: skip
def test_learning_rates_and_wide_axes_are_drawn_in_logarithms(key: str, values: list[Any], logarithmic: bool) -> None:
    assert is_logarithmic(key, values) is logarithmic


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    "points",
    [
        over_seeds({1e-6: [0.5, 0.6], 1e-5: [0.4, 0.6]}),
        [point({"adapter.init": word, GAMMA: gamma}, 0.5) for word in ("default", "$x$") for gamma in (0.0, 0.1)],
        [point({LR: 1e-6}, 0.5), point({LR: 1e-3}, 0.0, status="failed", held_out={})],
        [point({SEED: n}, 0.5) for n in range(3)],
    ],
    ids=["seeds", "words", "failed", "seeds alone"],
)
def test_pictures_are_drawn(points: list[Point], theme: Any) -> None:
    sweep = record(points)
    assert sweep_png(drawable(sweep), sweep, choose(sweep), theme).startswith(b"\x89PNG")


def test_a_sweep_without_a_finished_run_has_a_table_and_no_picture(tmp_path: Path) -> None:
    report = write_sweep(record([point({LR: 1e-6}, 0.0, status="failed", reason="bad", held_out={})], tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv"]
    assert "none yet" in report.table()
    assert str(tmp_path / "sweep.html") not in report.table()
    assert report.as_dict()["best"] is None
