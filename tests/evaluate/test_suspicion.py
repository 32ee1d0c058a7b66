"""The formula of suspicion against its definition, and what is said of it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lorafocal.evaluate.suspicion import TABLE_ROWS, Suspect, Suspects, summary, suspect


def margins(*columns: tuple[float, ...]) -> torch.Tensor:
    """A pair each, its margins by state."""
    return torch.tensor(columns, dtype=torch.float64).T


def test_suspicion_is_the_mean_loss_of_dpo_over_states() -> None:
    found = suspect(margins((1.0, -2.0), (-3.0, -0.5), (0.0, 4.0)))
    loss = [math.log1p(math.exp(-z)) for z in (1, -2, -3, -0.5, 0, 4)]
    assert found.nats.tolist() == pytest.approx([sum(loss[n : n + 2]) / 2 for n in (0, 2, 4)])
    assert found.always_wrong.tolist() == [False, True, False]


def test_a_tie_is_not_wrong() -> None:
    assert not suspect(margins((0.0, -1.0))).always_wrong.any()


def test_the_threshold_moves_with_the_width_of_the_margins() -> None:
    drawn = torch.randn(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    for beta in (1.0, 0.1):
        found = suspect(beta * drawn)
        share = torch.exp(-found.nats)
        assert torch.equal(found.confident, share <= 1 - share.mean())
        assert 0.02 < found.confident.double().mean() < 0.2


def test_a_run_that_ranks_no_better_than_chance_is_confident_of_nothing() -> None:
    found = suspect(margins((-1.0,), (-2.0,), (0.5,)))
    assert found.always_wrong.sum() == 2
    assert not found.confident.any()


def test_margins_of_any_size_give_finite_numbers() -> None:
    assert suspect(margins((-1e4, -1e4), (1e4, 1e4))).nats.tolist() == pytest.approx([1e4, 0.0])


def found_of(count: int, **changes: object) -> Suspects:
    one = Suspect("a", "x, row 1", "a\tb", 0.9, 0.4, True, (-0.4, -0.5), -1.5, 3, 4, "q\x1b[2J\n?", "no", "yes")
    values: dict[str, object] = {
        "run": "mine", "of": "its training pairs", "steps": (2, 4), "pairs": 50, "right": 30, "always_wrong": count,
        "confident": 1, "mean_p": 0.6, "found": (one,) * count,
    }  # fmt: skip
    return Suspects(**values | changes)  # type: ignore[arg-type]


def test_the_table_shows_the_first_and_counts_the_rest_and_no_control_characters() -> None:
    text = found_of(TABLE_ROWS + 5).table()
    assert "... and 5 more" in text
    assert "0.900*  0.400  rejected         3/4  a: q [2J ?" in text
    assert "\x1b" not in text


def test_what_is_said_and_what_is_written_are_the_confident_ones() -> None:
    found = found_of(2)
    assert "1 of them confidently (p at most 0.400, where labels have 0.600 on average)" in summary(found)[1]
    assert "none of them confidently, because" in summary(found_of(2, mean_p=0.5))[1]
    assert len(found.to_leave_out) == 2
    record = json.loads(json.dumps(found.as_dict()))
    assert record["suspects"][0]["margins"] == [-0.4, -0.5]
    assert "prompt" not in record["suspects"][0]
