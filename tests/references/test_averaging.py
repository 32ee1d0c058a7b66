"""The average of low-rank changes is exact in Delta W, keeps its rank low, and is not the average of the factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafocal.references import averaging
from lorafocal.references.averaging import LowRank, averaged, compressed

OUT, IN, RANK = 24, 20, 4


def change(seed: int, rank: int = RANK, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((rank, IN), (OUT, rank)))
    return LowRank(a.to(dtype), b.to(dtype), scale)


def delta(of: LowRank) -> Tensor:
    return of.scale * of.b.double() @ of.a.double()


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
@pytest.mark.parametrize("mixing", [0.5, 0.6, 0.05])
def test_the_average_is_that_of_the_changes_step_after_step(dtype, apart, mixing):
    reference = change(0, dtype=dtype)
    expected = delta(reference)
    for step in range(1, 6):
        policy = change(step, scale=0.7, dtype=dtype)
        reference = averaged(policy, reference, mixing)
        expected = mixing * delta(policy) + (1 - mixing) * expected
        assert float((delta(reference) - expected).norm() / expected.norm()) < apart
        assert reference.a.dtype == reference.b.dtype == dtype
    assert reference.scale == 2.0


def test_the_average_of_the_factors_is_another_model():
    """What would be had by moving A and B each for itself."""
    policy, reference = change(1), change(2)
    apart = LowRank(*(0.5 * (mine + other) for mine, other in zip(policy[:2], reference[:2], strict=True)), 2.0)
    expected = 0.5 * (delta(policy) + delta(reference))
    assert float((delta(averaged(policy, reference, 0.5)) - expected).norm() / expected.norm()) < 1e-6
    assert float((delta(apart) - expected).norm() / expected.norm()) > 0.1


def test_what_is_shared_counts_once_and_what_fades_is_let_go():
    one = change(1)
    assert averaged(one, one, 0.5).a.shape[0] == RANK
    other = averaged(one, change(2), 0.5)
    assert other.a.shape[0] == 2 * RANK
    for _ in range(40):  # of a policy that rests, half of what the reference lacks is made up each time
        other = averaged(one, other, 0.5)
    assert other.a.shape[0] == RANK
    assert torch.allclose(delta(other), delta(one), atol=1e-6)


def test_ranks_stay_within_the_weights_own_sides_and_above_none():
    reference = change(0)
    for step in range(1, 12):
        reference = averaged(change(step), reference, 0.1)
    assert reference.a.shape[0] == IN
    nothing = change(1)._replace(b=torch.zeros(OUT, RANK, dtype=torch.float64))
    still = averaged(nothing, nothing, 0.5)
    assert still.a.shape == (1, IN)
    assert not delta(still).any()
    assert bool(still.a.isfinite().all())


def test_what_is_dropped_is_below_what_single_precision_holds():
    b, a = compressed(change(1).b, change(1).a)
    assert torch.allclose(b @ a, change(1).b @ change(1).a, atol=1e-12)
    assert torch.allclose(a @ a.T, torch.eye(RANK, dtype=torch.float64), atol=1e-12)
    assert averaging.DROPPED < torch.finfo(torch.float32).eps
