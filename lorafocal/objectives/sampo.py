"""SamPO: of a pair's longer answer as many tokens are drawn as the shorter one has."""

from __future__ import annotations

import random

from torch import Tensor


def weights(policy_tokens: Tensor, *, lengths: Tensor, draws: Tensor) -> Tensor:
    """1 for the tokens that are drawn, without replacement, and for all of the shorter answer, else 0, (N,).

    `draws` (B,) in [0, 1) decide: by seed, step and pair, so that a pair shows other tokens each time, a resumed run
    the same ones, and policy and reference are always asked for the same. The authors' code draws for each model anew:
    its log-ratios are then of different tokens, which is noise alone.

    Source: Lu et al. 2024, arXiv:2406.10957; LuJunru/SamPO.
    """
    drawn = policy_tokens.new_zeros(len(policy_tokens))
    counts, pairs = lengths.tolist(), len(draws)
    starts = [sum(counts[:n]) for n in range(2 * pairs)]
    taken: list[int] = []
    for pair, draw in enumerate(draws.tolist()):
        fewer, more = sorted((pair, pair + pairs), key=counts.__getitem__)
        taken += range(starts[fewer], starts[fewer] + counts[fewer])
        taken += random.Random(f"sampo {draw!r}").sample(
            range(starts[more], starts[more] + counts[more]), counts[fewer]
        )
    drawn[taken] = 1.0
    return drawn
