"""Only the tokens that the pair's other answer does not have."""

from __future__ import annotations

from torch import Tensor


def weights(policy_tokens: Tensor, *, differs: Tensor) -> Tensor:
    """1 where a token `differs`, else 0, (N,)."""
    return differs.to(policy_tokens)
