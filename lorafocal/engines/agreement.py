"""What ranks must agree on: a flag that is raised on any of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def anywhere(flag: bool, device: torch.device) -> bool:
    """Collective: whether `flag` is true on any rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)
