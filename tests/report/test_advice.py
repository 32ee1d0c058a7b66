"""The gamma advisor against closed forms, and what it says of margins as real runs have them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.evaluations import EvaluatedPair
from lorafocal.objectives.focal import focal_weight, turning_point
from lorafocal.objectives.pairwise import dpo_weight
from lorafocal.report.advice import GAMMAS, GammaRow, RunAdvice, advise, correlation, gamma_row, share_of_weights
from tests.written_run import write_run

BETA = 0.01


def normal(mean: float, deviation: float, count: int = 20_000) -> Tensor:
    """Margins at the quantiles of a normal distribution: no draw, and the same everywhere."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return mean + deviation * torch.special.ndtri(places)


def advised(
    folder: Path, margins: Tensor, *, beta: float = BETA, objective: str = "focalpo", step: int = 7
) -> RunAdvice:
    rows = [EvaluatedPair(str(n), z / beta - 40.0, -50.0, -40.0, -50.0) for n, z in enumerate(margins.tolist())]
    config = {"objective.name": objective, "objective.beta": beta}
    return advise([write_run(folder, tables={1: rows[:1], step: rows}, config=config)]).runs[0]


def at(found: RunAdvice, gamma: float) -> GammaRow:
    return next(row for row in found.gammas if row.gamma == gamma)


def test_at_the_margins_of_real_runs_the_papers_gamma_is_dpo_to_within_a_hair(tmp_path: Path) -> None:
    found = advised(tmp_path / "run", normal(0.3, 0.6))
    row = at(found, 0.05)
    assert (found.beta, found.step, found.pairs) == (BETA, 7, 20_000)
    assert row.correlation == pytest.approx(0.9985, abs=5e-5)
    assert row.weight_over_dpo == pytest.approx(0.934, abs=5e-4)
    assert row.moved == pytest.approx(0.0111, abs=5e-5)
    assert row.turned_share == 0
    assert found.advice == (
        "At gamma 0.05 FocalPO will hardly differ from DPO on these pairs: 1.1% of the gradient's weight moves to other"
        " pairs, and its weights correlate 0.9985 with DPO's; it differs from gamma 0.5 on (13.0% moves); from gamma 1"
        " on pairs are pushed the wrong way (8.0% of them)"
    )


def test_wide_margins_make_the_papers_gamma_differ_and_say_where_pairs_turn(tmp_path: Path) -> None:
    found = advised(tmp_path / "run", normal(2, 4), beta=0.1)
    assert found.advice.startswith("At gamma 0.05 FocalPO will differ from DPO on these pairs: 8.2% of")
    assert "it differs from" not in found.advice.split(";")[1]
    assert found.advice.endswith("from gamma 0.1 on pairs are pushed the wrong way (0.1% of them)")


def test_narrow_margins_are_said_to_make_no_gamma_differ_whatever_the_correlation(tmp_path: Path) -> None:
    found = advised(tmp_path / "run", normal(0.05, 0.05))
    assert at(found, 1.0).correlation == pytest.approx(-1, abs=1e-2)
    assert max(row.moved for row in found.gammas) < 0.05
    assert "no gamma up to 1 makes it differ" in found.advice


def test_before_the_first_step_there_is_nothing_to_say(tmp_path: Path) -> None:
    found = advised(tmp_path / "run", torch.zeros(5, dtype=torch.float64) + 0.1)  # a margin of 10 nats - 10 nats
    assert all(row.correlation is None and row.moved == pytest.approx(0, abs=1e-12) for row in found.gammas)
    rows = [EvaluatedPair(str(n), -40.0, -50.0, -40.0, -50.0) for n in range(5)]
    still = advise([write_run(tmp_path / "still", tables={0: rows})])
    assert still.runs[0].advice.startswith("Every margin is 0")
    assert json.loads(json.dumps(still.as_dict(), allow_nan=False))["runs"][0]["gammas"][0]["correlation"] is None
    assert "-" in still.table()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_number_is_its_definition(gamma: float) -> None:
    margins = normal(-1, 5, 301)
    row, focal, dpo = (
        gamma_row(margins, gamma),
        focal_weight(margins, gamma=gamma).tolist(),
        dpo_weight(margins).tolist(),
    )
    count, turned = len(focal), turning_point(gamma)
    assert row.weight_over_dpo == pytest.approx(sum(focal) / sum(dpo))
    assert row.effective_share == pytest.approx(sum(focal) ** 2 / sum(w * w for w in focal) / count)
    assert row.turned_share == pytest.approx(sum(z < turned for z in margins.tolist()) / count)
    whole = sum(map(abs, focal))
    apart = sum(abs(f / whole - d / sum(dpo)) for f, d in zip(focal, dpo, strict=True)) / 2
    assert row.moved == pytest.approx(apart)
    assert 0 <= row.moved <= 1


def test_pairs_are_turned_where_no_float_holds_their_weight() -> None:
    assert gamma_row(torch.tensor([-2000.0, 1.0, 2.0]), 0.5).turned_share == pytest.approx(1 / 3)


def test_shares_and_correlations_of_weights_that_are_known() -> None:
    same, one = torch.ones(8, dtype=torch.float64), torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
    assert share_of_weights(same) == 1
    assert share_of_weights(one) == pytest.approx(0.25)
    assert correlation(same, same) is None
    assert correlation(one, 5 - 2 * one) == pytest.approx(-1)


def test_margins_of_any_size_give_finite_numbers() -> None:
    for margins in (torch.tensor([1e4, 2e4]), torch.tensor([-1e4, 1e4, 0.0]), torch.tensor([800.0, 900.0])):
        for gamma in GAMMAS:
            row = gamma_row(margins.double(), gamma)
            assert all(math.isfinite(v) for v in (row.weight_over_dpo, row.effective_share, row.moved))


def test_runs_without_margins_per_nat_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"simpo, whose rewards are not beta times the.*run of DPO or FocalPO"):
        advised(tmp_path / "simpo", normal(0, 1, 9), objective="simpo")
    with pytest.raises(InputError, match=r"bare has no evaluation of single pairs.*data\.held_out"):
        advise([write_run(tmp_path / "bare", tables={})])
    with pytest.raises(InputError, match="one or more above 0"):
        advise([tmp_path / "bare"], gammas=[0.0, 0.1])


def test_several_runs_are_advised_on_one_by_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    found = advise(folders, gammas=[0.2, 0.05])
    assert [run.run for run in found.runs] == ["one", "two"]
    assert [row.gamma for row in found.runs[0].gammas] == [0.05, 0.2]
    assert found.table().count("held-out pairs after step 10") == 2


def test_the_documented_table_is_what_is_computed() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "advice.md").read_text(encoding="utf-8")
    lines = [line for line in page.replace("*", "").splitlines() if line.startswith(("| 0.", "| 1 "))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [float(row[0]) for row in rows] == list(GAMMAS)
    for gamma, weight, effective, turned, linked, moved in rows:
        found = gamma_row(normal(0.3, 0.6), float(gamma))
        assert f"{found.weight_over_dpo:.3f}" == weight
        assert f"{found.effective_share:.1%}" == effective
        assert found.turned_share == pytest.approx(float(turned.rstrip("%")) / 100, abs=6e-4)
        assert found.correlation == pytest.approx(float(linked), abs=10 ** -len(linked.partition(".")[2]))
        assert f"{found.moved:.1%}" == moved
