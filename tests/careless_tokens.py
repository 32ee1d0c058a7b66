"""What a careless author would have written of weighted tokens and of their stored log-probs.

Imported by `tests/guards.py`, which must stay light.
"""

from __future__ import annotations

from typing import Any


def drawn_anew(policy_tokens: Any, *, lengths: Any, draws: Any) -> Any:
    """Row 55: SamPO's tokens by a generator of the process, as the authors' code draws: a resumed run has others."""
    import torch

    from lorafocal.objectives.tokens import shorter

    fewest = shorter(lengths).tolist()
    rows = [torch.randperm(int(n)) < few for n, few in zip(lengths, fewest, strict=True)]
    return torch.cat(rows).to(policy_tokens)


def discounts_as_printed(policy_tokens: Any, *, sequence: Any, lengths: Any, turns: Any, turn_discount: float) -> Any:
    """Row 11: DMPO's ratio of differences from 1, which near discount 1 has no digits left, and at 1 is 0 over 0."""
    count = (turns[lengths.cumsum(0) - 1] + 1)[sequence].to(policy_tokens)
    turn = turns.to(policy_tokens)
    return turn_discount**turn * (1 - turn_discount ** (count - turn)) / (1 - turn_discount**count)


def key_of_the_ids_alone(prompt_ids: Any, completion_ids: Any, turns: Any = None) -> bytes:
    """Row 35: a stored log-prob is found by its tokens, whichever of them it was summed over."""
    import hashlib

    return hashlib.sha256(repr((prompt_ids, completion_ids)).encode()).digest()
