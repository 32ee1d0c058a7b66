"""Each rule speaks on a run where it must and is silent on one where it must not."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from lorafocal.objectives import build_objective
from lorafocal.report import words
from lorafocal.report.read import RunRecord, read_run
from lorafocal.report.words import RULES, comparison_remarks, remarks
from tests.written_run import BETA, GAMMA, evaluation_line, pairs, training_line, write_run


def record_of(*lines: dict[str, Any], name: str = "a", beta: float = BETA, **manifest: Any) -> RunRecord:
    return RunRecord(name, lines, (), manifest, build_objective("focalpo", beta=beta, gamma=GAMMA))


QUIET = (training_line(1), evaluation_line(1), training_line(10), evaluation_line(10))


def test_a_quiet_run_gets_no_remark(tmp_path: Path) -> None:
    assert remarks(record_of(*QUIET)) == []
    assert remarks(read_run(write_run(tmp_path / "a"), "a")) == []


@pytest.mark.row("17")
@pytest.mark.parametrize("source", ["table", "held out", "training"])
def test_chosen_answers_that_fall_more_than_a_nat_get_a_line(tmp_path: Path, source: str) -> None:
    if source == "table":
        rows = pairs(chosen=[-3.0, -2.0, 0.5], rejected=[-9.0] * 3, references=[1.0] * 3)
        record = read_run(write_run(tmp_path / "a", tables={10: rows}), "a")
    elif source == "held out":
        record = record_of(*QUIET, evaluation_line(20, logps__chosen=-11.5, focal__chosen_fell_share=2 / 3))
    else:
        record = record_of(training_line(5, logps__chosen=-11.5, focal__chosen_fell_share=2 / 3))
    [remark] = remarks(record)
    assert "by 1.5 nats on average; 67% of them fell" in remark.seen
    assert ("training" if source == "training" else "held-out") in remark.seen
    assert "displacement" in remark.means
    assert "learning_rate" in remark.do


@pytest.mark.row("17")
def test_chosen_answers_that_fall_less_than_a_nat_get_none(tmp_path: Path) -> None:
    rows = pairs(chosen=[-0.9, -0.9], rejected=[-9.0, -9.0])
    assert words.chosen_fell(read_run(write_run(tmp_path / "a", tables={10: rows}), "a")) is None


def test_what_is_said_of_rejected_answers_holds() -> None:
    faster = words.chosen_fell(record_of(training_line(5, logps__chosen=-11.5, logps__rejected=-19.0)))
    slower = words.chosen_fell(record_of(training_line(5, logps__chosen=-11.5, logps__rejected=-12.0)))
    assert faster is not None
    assert slower is not None
    assert "fell faster" in faster.means
    assert "fell faster" not in slower.means


def right(before: float, after: float, accuracy: tuple[float, float] = (0.5, 0.9)) -> RunRecord:
    evaluations = [evaluation_line(s, rewards__accuracies=a) for s, a in zip((1, 10), accuracy, strict=True)]
    answers = [{"eval_right_answers": share, "step": step} for step, share in ((0, before), (10, after))]
    return record_of(*QUIET, *evaluations, *answers)


def test_right_answers_that_fall_while_accuracy_rises_get_a_line() -> None:
    [remark] = remarks(right(0.55, 0.31))
    assert "fell from 55.0% to 31.0%" in remark.seen
    assert "rose from 50.0% to 90.0%" in remark.seen
    [remark] = remarks(right(0.55, 0.31, (0.9, 0.89)))
    assert "reward accuracy stayed (90.0%, now 89.0%)" in remark.seen


@pytest.mark.parametrize(
    "record", [right(0.55, 0.7), right(0.55, 0.54), right(0.55, 0.31, (0.9, 0.5)), record_of(*QUIET)]
)
def test_right_answers_that_rise_or_accuracy_that_falls_get_none(record: RunRecord) -> None:
    assert words.answers_fell(record) is None


def test_pairs_past_the_turning_point_get_a_line() -> None:
    record = record_of(
        *QUIET, training_line(20, focal__turned_share=0.01), training_line(30, focal__turned_share=0.005)
    )
    [remark] = remarks(record)
    assert "Up to 1.00% of the pairs (step 20)" in remark.seen
    assert "margin below -20.00" in remark.seen
    assert words.pairs_turned(record_of(*QUIET)) is None


def test_pairs_past_the_turning_point_of_another_loss_are_told_by_its_own_keys() -> None:
    lines = [*QUIET, training_line(20, focal__turned_share=0.01)]
    focal = {"form": "p_gamma", "gamma": 0.5}
    free, guarded = (
        words.pairs_turned(replace(record_of(*lines), objective=build_objective("simpo", focal=focal, guard=guard)))
        for guard in (None, "clip")
    )
    for found in (free, guarded):
        assert "objective.focal.gamma" in found.do
        assert "margin below" not in found.seen  # its log-odds are not its margin
    assert "still further" in free.means
    assert "guard: clip leaves these pairs without one" in guarded.means


@pytest.mark.parametrize("changes", [{"rewards__margins": 1e-5}, {"rewards__ties": 0.95}])
def test_a_run_that_does_not_move_gets_a_line(changes: dict[str, float]) -> None:
    [remark] = remarks(record_of(training_line(1, **changes), training_line(10, **changes)))
    assert "nothing has moved" in remark.seen


def test_before_the_first_step_nothing_can_have_moved() -> None:
    assert words.nothing_moved(record_of(training_line(1, rewards__margins=0.0, rewards__ties=1.0))) is None
    assert words.nothing_moved(record_of({"loss": 2.0, "step": 40})) is None  # sft has no margin


def test_a_small_margin_without_a_reference_is_no_sign_that_nothing_moved() -> None:
    still = record_of(training_line(9, rewards__margins=1e-4))
    assert words.nothing_moved(still) is not None
    assert words.nothing_moved(replace(still, objective=build_objective("orpo"))) is None


def losses(training: list[float], held_out: list[float]) -> RunRecord:
    """Logged and evaluated after every step."""
    steps = enumerate(zip(training, held_out, strict=True), start=1)
    both = [(training_line(step, loss=ours), evaluation_line(step, loss=theirs)) for step, (ours, theirs) in steps]
    return record_of(*chain(*both))


def test_held_out_loss_that_rises_while_training_loss_falls_gets_a_line() -> None:
    remark = words.held_out_rose(losses([0.69, 0.62, 0.58], [0.68, 0.6, 0.63]))
    assert remark is not None
    assert "lowest at step 2 (0.6000) and rose to 0.6300" in remark.seen
    assert "from 0.6200 to 0.5800" in remark.seen


@pytest.mark.parametrize(
    "record",
    [
        losses([0.69, 0.62, 0.58], [0.68, 0.6, 0.601]),
        losses([0.69, 0.62, 0.66], [0.68, 0.6, 0.63]),
        losses([0.69, 0.62, 0.58], [0.68, 0.6, 0.59]),
        losses([0.6], [0.6]),
    ],
)
def test_held_out_loss_that_follows_gets_none(record: RunRecord) -> None:
    assert words.held_out_rose(record) is None


@pytest.mark.row("18")
def test_training_loss_far_below_held_out_loss_gets_a_line() -> None:
    """The step-shaped drop of a second epoch: seen pairs are fitted, held-out ones are not."""
    remark = words.fits_training_closer(losses([0.69, 0.65, 0.64, 0.4], [0.69, 0.65, 0.64, 0.64]))
    assert remark is not None
    assert "0.2400 nats below the held-out loss (0.6400)" in remark.seen
    assert words.fits_training_closer(losses([0.69, 0.65, 0.62], [0.69, 0.65, 0.64])) is None


def test_ties_that_an_accuracy_hides_get_a_line() -> None:
    [remark] = remarks(record_of(*QUIET, evaluation_line(20, rewards__ties=0.5, rewards__accuracies=0.45)))
    assert "50% of the held-out pairs are exact ties" in remark.seen
    assert "is 45%" in remark.seen
    assert "would read 90%" in remark.seen
    assert words.ties_hidden(record_of(*QUIET, evaluation_line(20, rewards__ties=0.01))) is None
    assert words.ties_hidden(record_of(*QUIET, evaluation_line(20, rewards__ties=1.0, rewards__accuracies=0.0))) is None


def ranked(tmp_path: Path, lost: int, won: int) -> RunRecord:
    rows = pairs([-5.0] * lost + [5.0] * won, [0.0] * (lost + won), [1.0] * lost + [-1.0] * won)
    return read_run(write_run(tmp_path / f"{lost}-{won}", tables={10: rows}), "a")


def test_rankings_that_training_undid_get_a_line(tmp_path: Path) -> None:
    remark = words.more_unlearned(ranked(tmp_path, lost=20, won=4))
    assert remark is not None
    assert "ranks 20 held-out pairs wrong" in remark.seen
    for lost, won in ((4, 20), (6, 4), (0, 3)):
        assert words.more_unlearned(ranked(tmp_path, lost, won)) is None


def test_numbers_that_are_not_finite_get_a_line() -> None:
    [remark] = remarks(record_of(*QUIET, training_line(20, grad_norm=float("nan"))))
    assert remark.seen == "grad_norm was not a finite number at step 20."


@pytest.mark.parametrize(("highest", "told"), [(-0.01, True), (0.01, False)])
@pytest.mark.parametrize("key", ["eval_right_answers", "eval_win_rate"])
def test_where_the_interval_of_the_change_is_known_it_decides(key: str, highest: float, told: bool) -> None:
    accuracies = [evaluation_line(step, rewards__accuracies=share) for step, share in ((0, 0.0), (10, 0.9))]
    change = {f"{key}_change": -0.3, f"{key}_change_low": -0.5, f"{key}_change_high": highest}
    record = record_of(*QUIET, *accuracies, {key: 0.7, "step": 0}, {key: 0.4, "step": 10, **change})
    remark = words.answers_fell(record)
    assert (remark is not None) == told
    assert remark is None or "fell from 70.0% to 40.0%" in remark.seen


@pytest.mark.parametrize(("grew", "mended", "told"), [(20, 0, True), (20, 4, False), (4, 0, False)])
def test_margins_that_grow_where_no_ranking_is_mended_are_told(
    tmp_path: Path, grew: int, mended: int, told: bool
) -> None:
    """Of 25 pairs that the reference ranks wrong by 4 nats."""
    gains = [5.0] * mended + [1.0] * (grew - mended) + [-1.0] * (25 - grew)
    rows = pairs(chosen=gains, rejected=[0.0] * 25, references=[-4.0] * 25)
    remark = words.ranking_did_not_follow(read_run(write_run(tmp_path / "a", tables={10: rows}), "a"))
    assert (remark is not None) == told
    assert remark is None or "Of the 25 held-out pairs" in remark.seen


def test_a_handful_of_wrongly_ranked_pairs_tells_nothing(tmp_path: Path) -> None:
    rows = pairs(chosen=[1.0] * 9, rejected=[0.0] * 9, references=[-4.0] * 9)
    assert words.ranking_did_not_follow(read_run(write_run(tmp_path / "a", tables={10: rows}), "a")) is None


def test_a_gradient_that_few_pairs_lead_is_told_of_held_out_pairs_before_training_ones() -> None:
    [remark] = remarks(record_of(*QUIET, evaluation_line(20, focal__effective_share=0.2)))
    assert "count for 20% of their number" in remark.seen
    assert remarks(record_of(*QUIET, training_line(20, focal__effective_share=0.2))) == []
    assert words.few_pairs_lead(record_of(training_line(20, focal__effective_share=0.2))) is not None


@pytest.mark.parametrize(("correlation", "word"), [(0.7, "longer"), (-0.7, "shorter")])
def test_margins_that_go_along_with_length_are_told(correlation: float, word: str) -> None:
    [remark] = remarks(record_of(*QUIET, evaluation_line(20, rewards__length_correlation=correlation)))
    assert f"correlation {correlation:+.2f}" in remark.seen
    assert f"the {word} answer" in remark.means


def test_every_rule_says_what_it_looks_for() -> None:
    assert {rule.__name__ for rule in RULES.values()} == {
        "not_finite", "nothing_moved", "chosen_fell", "answers_fell", "pairs_turned", "more_unlearned",
        "held_out_rose", "fits_training_closer", "ties_hidden", "ranking_did_not_follow", "few_pairs_lead",
        "margin_goes_with_length",
    }  # fmt: skip


def test_runs_that_cannot_be_compared_are_told() -> None:
    manifest = {"data": {"eval": {"tokens_sha256": "x"}}, "base": {"sha256": "b"}}
    other = {"data": {"eval": {"tokens_sha256": "y"}}, "base": {"sha256": "c"}}
    one = record_of(*QUIET, **manifest)
    assert comparison_remarks([one, record_of(*QUIET, name="b", **manifest), record_of(*QUIET, name="c")]) == []
    found = " ".join(
        remark.seen for remark in comparison_remarks([one, record_of(*QUIET, name="b", beta=0.5, **other)])
    )
    for part in ("beta (a 0.1, b 0.5)", "held-out pairs", "base model"):
        assert part in found
