"""What is printed of a change that was rounded, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.release import survival
from lorafocal.release.survival import LayerSurvival, measure_survival, survival_notes, survival_table


def planted(std: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A base in bfloat16, a change of rank 4 with this standard deviation, and what `dtype` stores of the sum."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(96, 160)).bfloat16()
    delta = torch.randn(96, 4) @ torch.randn(4, 160)
    delta *= std / delta.std()
    return weight, delta, (weight.float() + delta).to(dtype)


@pytest.mark.row("43")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("std", [1e-2, 1e-3, 1e-4, 1e-5])
def test_survival_is_the_true_one(std: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survival, "_BLOCK", 1000)  # several blocks, the last of them shorter
    weight, delta, stored = planted(std, dtype)
    found = measure_survival("layer", weight, delta, stored)
    w, d, q = weight.double(), delta.double(), stored.double()
    base = weight.to(dtype).double()
    assert found.kept == pytest.approx((((q - base) * d).sum() / d.square().sum()).item(), rel=1e-2)
    assert found.error == pytest.approx(((q - w - d).norm() / d.norm()).item(), rel=1e-2, abs=1e-4)  # float32's own
    assert found.delta_norm == pytest.approx(d.norm().item(), rel=1e-5)


@pytest.mark.parametrize("value", [1e35, float("inf"), float("nan")])
def test_a_change_that_cannot_be_measured_is_refused_by_its_layer(value: float) -> None:
    weight, delta, _ = planted(1e-3, torch.float32)
    delta[3, 5] = value
    with pytest.raises(InputError, match=r"the adapter changes mlp\.up by numbers up to .*Restore it"):
        measure_survival("mlp.up", weight, delta, weight.float() + delta)


def test_the_smaller_a_change_the_less_of_it_is_kept_and_none_of_nothing_is_lost() -> None:
    errors = [measure_survival("l", *planted(std, torch.bfloat16)).error for std in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert errors == sorted(errors)
    weight, delta, stored = planted(1e-3, torch.float32)
    assert measure_survival("l", weight, delta, stored).error < 1e-4
    assert measure_survival("l", weight, torch.zeros_like(delta), weight) == LayerSurvival("l", 1.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 4)])
def test_tensors_of_every_shape_are_measured(shape: tuple[int, ...]) -> None:
    weight, delta = torch.ones(shape), torch.full(shape, 0.5)
    found = measure_survival("l", weight, delta, weight + delta)
    assert (found.kept, found.error) == (1.0, 0.0)


def test_table_and_warning_name_the_worst() -> None:
    layers = [LayerSurvival("good", 0.99, 0.1, 1.0), LayerSurvival("poor", 0.4, 2.0, 1.0)]
    layers.append(LayerSurvival("fair", 0.95, 0.2, 1.0))
    table = survival_table(layers, "bfloat16")
    assert "3 layers" in table
    assert ["(poor)", "(good)"] == [line.split()[-1] for line in table.splitlines() if "(" in line]
    [note] = survival_notes(layers, "bfloat16")
    assert "1 of 3 layers" in note
    assert "poor, 40%" in note
    assert survival_notes(layers[::2], "bfloat16") == ()
    assert survival_notes([LayerSurvival("nan", float("nan"), 1.0, 1.0)], "bfloat16")
