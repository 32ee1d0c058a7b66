"""What torch.compile makes of the fused functions has their values and gradients, in every dtype they compute in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lorafocal.ops import lora, trace_check
from lorafocal.ops.elementwise import GEGLU, TORCH
from lorafocal.ops.kernel_check import TOLERANCE
from lorafocal.ops.trace_check import traced_linears, traced_mlp, traced_norm

CPU = torch.device("cpu")
CHECKS: dict[str, Callable[[torch.dtype], float]] = {
    "norm": lambda dtype: traced_norm.__wrapped__(TORCH, dtype, CPU),
    "linears": lambda dtype: traced_linears.__wrapped__(dtype, CPU),
    "mlp": lambda dtype: traced_mlp.__wrapped__(TORCH.gated, False, dtype, CPU),
    "mlp, computed again": lambda dtype: traced_mlp.__wrapped__(GEGLU, True, dtype, CPU),
}


@pytest.mark.engine
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_a_compiled_function_is_the_function(name, dtype):
    torch._dynamo.reset()
    counters.clear()
    assert CHECKS[name](dtype) <= TOLERANCE[dtype]
    assert not counters["graph_break"]


@pytest.mark.engine
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("name", ["linears", "mlp", "mlp, computed again"])
def test_one_lost_gradient_is_seen(name, at, monkeypatch):
    """That of the first adapter's A, and that of the last one's B."""
    gradients = lora._gradients

    def lost(*given) -> list[Tensor]:
        found = gradients(*given)
        if torch.compiler.is_compiling() and found:
            found[at] = torch.zeros_like(found[at])
        return found

    monkeypatch.setattr(lora, "_gradients", lost)
    torch._dynamo.reset()
    assert CHECKS[name](torch.float64) == 1


@pytest.mark.parametrize("apart", [(0.0, math.nan), (math.nan, 0.0)])
def test_what_is_no_number_one_way_is_the_furthest(apart, monkeypatch):
    found = iter(apart)
    monkeypatch.setattr(trace_check, "_apart", lambda *_: next(found))
    assert math.isnan(CHECKS["linears"](torch.float64))
