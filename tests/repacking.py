"""A CPU on which bitsandbytes repacks 4-bit weights in evaluation mode (avx512_bf16), played on any CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def repacking_cpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """From now on layers that are made believe in such a CPU; returns the list that repacked weights are noted in.

    As there, repacked weights stay as they are, and gradients through them are wrong.
    """
    import bitsandbytes.nn.modules as modules

    repacked: list[torch.Tensor] = []

    def repack(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        repacked.append(data)
        return data.roll(1, 0), state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    return repacked
