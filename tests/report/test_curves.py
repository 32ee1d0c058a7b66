"""The paper's figures from the losses that train: golden values, curves against autograd, and the files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from lorafocal.errors import InputError
from lorafocal.objectives.focal import focal_loss, focal_weight
from lorafocal.report.curves import Drawing, facts, figure_2, figure_3, figure_4, write_curves
from tests.command import Report, call, stand_in

# gamma: margin and height of the highest weight, weight at 0, over DPO's, turning point, highest loss. Computed apart
# from this code, to the digits given.
GOLDEN = {
    0.02: (-3.185, 0.8422, 0.4863, 0.9726, -50.0, 18.394),
    0.05: (-2.2384, 0.70984, 0.46623, 0.93246, -20.0000, 7.3576),
    0.1: (-1.511, 0.5723, 0.4342, 0.8684, -9.99995, 3.6788),
    0.2: (-0.776, 0.4181, 0.3749, 0.7499, -4.9932, 1.8394),
    0.5: (0.194, 0.2340, 0.2310, 0.4620, -1.8546, 0.7358),
    1.0: (0.918, 0.1354, 0.0767, 0.1534, -0.5413, 0.3679),
}


def lines(drawing: Drawing) -> dict[str, torch.Tensor]:
    [plot] = drawing.plots
    return {line.name: line.values for line in plot.lines}


@pytest.mark.parametrize("gamma", GOLDEN)
def test_where_the_weight_peaks_and_turns(gamma: float) -> None:
    found = facts(gamma)
    peak, highest, start, ratio, turn, loss = GOLDEN[gamma]
    coarse, fine = 6e-4, 6e-5  # half a digit of three and of four decimals
    wanted = ((start, fine), (ratio, fine), (peak, coarse), (highest, fine), (turn, fine), (loss, coarse))
    for value, (golden, within) in zip(found.values(), wanted, strict=True):
        assert value == pytest.approx(golden, abs=within)


def test_the_paper_s_two_terms_sum_to_the_slope_of_its_loss() -> None:
    drawing = figure_3(0.05)
    found = lines(drawing)
    margin = drawing.plots[0].x.clone().requires_grad_()
    [slope] = torch.autograd.grad(focal_loss(margin, gamma=0.05).sum(), margin)
    terms = found["(1-p) p^gamma"] + found["gamma (1-p) p^gamma log p"]
    torch.testing.assert_close(terms, -slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["FocalPO: their sum"], -slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["DPO: 1-p"], torch.sigmoid(-drawing.plots[0].x))


def test_the_hard_emphasis_weighs_as_its_own_slope() -> None:
    drawing = figure_4(0.05)
    z = drawing.plots[0].x
    p, log_p = torch.sigmoid(z), logsigmoid(z)
    torch.testing.assert_close(lines(drawing)["(1-p)^1"], (1 - p) * ((1 - p) - p * log_p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lines(drawing)["FocalPO, p^0.05"], focal_weight(z, gamma=0.05))


def test_losses_are_drawn_over_p() -> None:
    hard, focal = figure_2((1.0,)).plots
    for plot, factor in ((hard, 1 - hard.x), (focal, focal.x)):
        dpo, one = plot.lines
        torch.testing.assert_close(dpo.values, -plot.x.log(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.values, -factor * plot.x.log(), rtol=1e-10, atol=1e-12)


def test_curves_replace_nothing_but_curves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_curves(out)
    write_curves(out, gamma=0.1)
    (out / "curves.csv").write_text("mine")
    for taken in ("curves.csv", "figure-2.png"):
        with pytest.raises(InputError, match="is not of earlier curves"):
            write_curves(out)
        assert (out / taken).exists()
        (out / "curves.csv").unlink(missing_ok=True)


def test_the_files_hold_the_curves(tmp_path: Path) -> None:
    report = write_curves(tmp_path / "out", gamma=0.1)
    assert [file.name for file in report.files] == ["figure-2.png", "figure-3.png", "figure-4.png", "curves.csv"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in report.files[:3])
    rows = list(csv.DictReader((tmp_path / "out" / "curves.csv").open()))
    told = {float(row["x"]): float(row["value"]) for row in rows if row["curve"] == "FocalPO, p^0.1"}
    z = torch.tensor(list(told), dtype=torch.float64)
    assert torch.equal(torch.tensor(list(told.values()), dtype=torch.float64), focal_weight(z, gamma=0.1))
    assert "margin of the highest weight" in report.table()
    assert report.as_dict()["highest weight"] == pytest.approx(0.5723, abs=1e-4)
    before = {file.name: file.read_bytes() for file in report.files}
    write_curves(tmp_path / "out", gamma=0.1)
    assert {file.name: file.read_bytes() for file in report.files} == before


@pytest.mark.parametrize(("gamma", "says"), [(0.0, "gamma 0 is DPO"), (1.5, "learns backwards"), (-1.0, "must be")])
def test_a_gamma_that_says_nothing_is_refused(tmp_path: Path, gamma: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_curves(tmp_path / "out", gamma=gamma)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --out"):
        write_curves(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_verb_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "report.curves", "write_curves", Report())
    assert call(monkeypatch, "curves", "--out", "x", "--gamma", "0.2", "--json") == 0
    assert calls == [((Path("x"),), {"gamma": 0.2})]
