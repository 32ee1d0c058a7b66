"""What engines split over GPUs."""

from __future__ import annotations


def sharded_bytes(parameters: int, gpus: int, stage: int, *, live_reference: bool = False) -> float:
    """Bytes a GPU of full-parameter training in mixed precision under ZeRO stage 0 to 3 (Rajbhandari et al., 2020).

    16 a parameter: bf16 weights and gradients, fp32 master and two moments. Stage 2 splits all but the weights, stage
    3 all; a live reference is one more set of weights, split as those are.
    """
    weights, gradients, states = (size / (gpus if stage >= splits else 1) for size, splits in ((2, 3), (2, 2), (12, 1)))
    return parameters * (weights * (2 if live_reference else 1) + gradients + states)
