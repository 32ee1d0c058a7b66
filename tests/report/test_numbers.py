"""Numbers of a run against their closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafocal.objectives import build_objective
from lorafocal.objectives.focal import focal_weight
from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import dpo_weight
from lorafocal.progress import loss_gap
from lorafocal.report.numbers import (
    at_the_end,
    displacement,
    displacement_series,
    first_middle_last,
    flips,
    gap_series,
    headline,
    own_weights,
    parts,
    right_answers,
    settings,
    table_margins,
    turned_share,
)
from lorafocal.report.read import PairTable, RunRecord, read_run
from tests.written_run import BETA, GAMMA, evaluation_line, pairs, training_line, write_run


def record_of(*lines: dict[str, float], tables: tuple[PairTable, ...] = ()) -> RunRecord:
    return RunRecord("a", lines, tables, {}, build_objective("focalpo", beta=BETA, gamma=GAMMA))


@pytest.mark.row("17")
def test_displacement_is_policy_minus_reference_of_either_side() -> None:
    record = record_of(training_line(1, logps__chosen=-13.5), evaluation_line(1, logps__chosen=-14.0))
    assert displacement_series(record, "chosen") == ([1], [-3.5])
    assert displacement_series(record, "chosen", "eval_").values == [-4.0]
    assert displacement_series(record, "rejected").values == [pytest.approx(-0.8)]
    moved = displacement(record)
    assert moved is not None
    assert (moved.chosen, moved.pairs, moved.chosen_fell_share) == (-4.0, "held-out", 0.2)


@pytest.mark.row("17")
def test_displacement_of_the_last_evaluated_pairs_counts_those_that_fell(tmp_path: Path) -> None:
    rows = pairs(chosen=[-4.0, -2.0, 1.0, 0.0], rejected=[-1.0] * 4, references=[1.0] * 4)
    moved = displacement(read_run(write_run(tmp_path / "a", tables={1: pairs(), 9: rows}), "a"))
    assert moved is not None
    assert moved.chosen == pytest.approx(-1.25)
    assert moved.rejected == pytest.approx(-1.0)
    assert moved.chosen_fell_share == 0.5


def test_without_reference_log_probs_nothing_is_made_up() -> None:
    assert displacement(record_of({"loss": 1.0, "logps/chosen": -3.0, "step": 1})) is None


@pytest.mark.row("18")
def test_the_gap_takes_the_training_loss_since_the_evaluation_before_as_a_run_says_it() -> None:
    """Doubles over epochs: the training loss drops at step 4, the held-out loss does not follow."""
    training = [training_line(step, loss=loss) for step, loss in ((1, 0.7), (3, 0.6), (4, 0.2), (6, 0.1))]
    held_out = [evaluation_line(step, loss=0.65) for step in (0, 3, 5, 6)]
    lines = sorted([*training, *held_out], key=lambda line: line["step"])
    gap = gap_series(record_of(*lines))
    assert gap.steps == [3, 5, 6]
    assert gap.values == pytest.approx([0.65 - (8 * 0.7 + 16 * 0.6) / 24, 0.45, 0.55])
    assert gap.values == [loss_gap(lines[: lines.index(line) + 1]) for line in held_out[1:]]
    assert headline(record_of(*lines))["gap"] == pytest.approx(0.55)


def test_margins_are_beta_times_the_difference_of_log_ratios() -> None:
    policy, reference = (PairLogps(*map(torch.tensor, logps)) for logps in (([-8.0], [-15.0]), ([-10.0], [-12.0])))
    table = PairTable(1, policy, reference)
    assert table_margins(table, BETA).item() == pytest.approx(BETA * ((-8 + 10) - (-15 + 12)))


def flip_record(tmp_path: Path, gamma: float = GAMMA) -> RunRecord:
    """right-right twice, right-wrong, wrong-right, wrong-wrong, and a tie of the reference that stays one."""
    rows = pairs(chosen=[1, 2, -5, 5, 1, 0], rejected=[0, 0, 0, 0, 0, 0], references=[1, 1, 1, -1, -9, 0])
    folder = write_run(tmp_path / "a", tables={1: pairs(), 9: rows}, config={"objective.gamma": gamma})
    return read_run(folder, "a")


def test_flips_are_counted_by_the_reference_and_the_policys_own_ranking(tmp_path: Path) -> None:
    groups = {(flip.initially_right, flip.finally_right): flip for flip in flips(flip_record(tmp_path))}
    counts = {key: flip.pairs for key, flip in groups.items()}
    assert counts == {(True, True): 2, (True, False): 1, (False, True): 1, (False, False): 2}
    assert sum(flip.share for flip in groups.values()) == pytest.approx(1.0)
    assert groups[True, True].mean_margin == pytest.approx(BETA * 1.5)
    assert groups[True, False].mean_margin == pytest.approx(BETA * -5)
    margins = BETA * torch.tensor([1.0, 2.0, -5.0, 5.0, 1.0, 0.0], dtype=torch.float64)
    for name, weight in (("own", focal_weight(margins, gamma=GAMMA)), ("dpo", dpo_weight(margins))):
        expected = float(weight[2] / weight.sum())
        assert getattr(groups[True, False], f"{name}_weight_share") == pytest.approx(expected)


def test_parts_are_the_pairs_that_the_reference_ranks_right_and_those_it_does_not(tmp_path: Path) -> None:
    right, wrong = parts(flip_record(tmp_path))
    assert (right.initially_right, right.pairs, right.finally_right, right.accuracy) == (True, 3, 2 / 3, 2 / 3)
    assert (wrong.initially_right, wrong.pairs, wrong.finally_right, wrong.accuracy) == (False, 3, 1 / 3, 2 / 3)
    assert right.chosen_displacement == pytest.approx((1 + 2 - 5) / 3)
    assert wrong.chosen_displacement == pytest.approx((5 + 1 + 0) / 3)
    assert right.rejected_displacement == wrong.rejected_displacement == 0.0


def test_a_part_without_pairs_is_no_part_and_without_beta_there_is_no_accuracy(tmp_path: Path) -> None:
    record = replace(read_run(write_run(tmp_path / "a"), "a"), objective=None)
    [right] = parts(record)
    assert (right.initially_right, right.accuracy) == (True, None)
    assert parts(replace(record, tables=())) == []


def test_what_stands_at_the_end_is_of_held_out_pairs_where_there_are_any() -> None:
    training = [training_line(step, ranking__kept=kept) for step, kept in ((1, 0.5), (9, 0.7))]
    assert at_the_end(record_of(*training), "ranking/kept") == 0.7
    held_out = evaluation_line(5, ranking__kept=0.9)
    assert at_the_end(record_of(*training, held_out), "ranking/kept") == headline(record_of(held_out))["kept"] == 0.9
    none_right = {key: value for key, value in held_out.items() if key != "eval_ranking/kept"}
    assert at_the_end(record_of(*training, none_right), "ranking/kept") is None


def test_only_weights_that_margins_tell_and_dpo_has_not_are_an_objectives_own(tmp_path: Path) -> None:
    assert {flip.own_weight_share for flip in flips(flip_record(tmp_path, gamma=0.0))} == {None}
    record = flip_record(tmp_path / "hard")
    for name, own in (("focalpo", True), ("focal-hard", True), ("dpo", False), ("odpo", False), ("kto", False)):
        table = flips(replace(record, objective=build_objective(name, beta=BETA)))
        assert all((flip.own_weight_share is not None) == own for flip in table)
        assert all(flip.dpo_weight_share is not None for flip in table)
    assert flips(replace(record, objective=build_objective("orpo"))) == []


def test_weights_of_both_signs_have_no_shares(tmp_path: Path) -> None:
    rows = pairs(chosen=[-300.0, 1.0], rejected=[0.0, 0.0], references=[1.0, 1.0])  # margin -30: turned
    record = read_run(write_run(tmp_path / "a", tables={1: rows}), "a")
    assert {flip.own_weight_share for flip in flips(record)} == {None}
    assert all(flip.dpo_weight_share is not None for flip in flips(record))


@pytest.mark.parametrize(
    ("steps", "shown"), [([5], [5]), ([1, 9], [1, 9]), ([0, 1, 2, 60, 100], [0, 60, 100]), ([0, 10, 20], [0, 10, 20])]
)
def test_three_evaluations_are_shown(steps: list[int], shown: list[int]) -> None:
    none = PairLogps(torch.zeros(1), torch.zeros(1))
    assert [table.step for table in first_middle_last([PairTable(step, none, none) for step in steps])] == shown


def test_the_headline_leaves_out_what_was_not_logged() -> None:
    assert headline(record_of({"loss": 0.5, "step": 3})) == {"steps": 3, "loss_first": 0.5, "loss_last": 0.5}
    values = headline(record_of(training_line(1), training_line(4, loss=math.nan)))
    assert math.isnan(values["loss_last"])
    assert values["peak_gib"] == 1.5


def test_right_answers_and_turned_shares_are_found_under_either_prefix() -> None:
    record = record_of(
        training_line(1, focal__turned_share=0.1), evaluation_line(1, focal__turned_share=0.3), training_line(2)
    )
    assert turned_share(record) == ([1, 2], [0.3, 0.0])
    assert right_answers(record) == ([], [])
    assert right_answers(record_of({"right_answers": 0.5, "step": 0})).values == [0.5]


def test_settings_are_flat_and_lists_stay_whole() -> None:
    config = {"name": "a", "data": {"train": [{"path": "x"}], "columns": {}}, "model": {"shape": {"layers": 2}}}
    assert settings({"config": config}) == {
        "name": "a", "data.train": [{"path": "x"}], "data.columns": {}, "model.shape.layers": 2,
    }  # fmt: skip
    assert settings({}) == {}


@pytest.mark.parametrize(
    ("objective", "shown"),
    [
        ({"name": "dpo"}, False),
        ({"name": "focalpo", "gamma": 0.0}, False),
        ({"name": "focalpo"}, True),
        ({"name": "cdpo"}, True),
        ({"name": "dpo", "focal": {"form": "hard", "gamma": 1.0}}, True),
        ({"name": "wpo"}, False),  # weighs by more than the margin
        ({"name": "h-dpo"}, False),  # its log-odds are not the margin
        ({"name": "simpo"}, False),
        ({"name": "kto"}, False),
    ],
)
def test_own_weights_are_shown_where_margins_tell_them_and_they_are_not_dpo_s(
    objective: dict[str, Any], shown: bool
) -> None:
    record = replace(record_of(), objective=build_objective(**objective))
    assert (own_weights(record) is not None) == shown
    if shown:
        assert own_weights(record).weights(torch.zeros(3)).shape == (3,)
