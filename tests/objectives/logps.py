"""Log-probabilities made up for tests of objectives, in float64 unless said."""

from __future__ import annotations

import torch

from lorafocal.objectives import PairLogps, PairScores

LENGTHS = torch.tensor([3, 9, 1, 40, 7, 5, 8, 2, 33, 6])  # of five pairs, chosen first
SCORES = PairScores(torch.tensor([5.0, 4.5, 9.0, 0.2, 3.0]), torch.tensor([1.0, 4.0, 2.0, 0.15, 2.0]))

COLLISIONS = -LENGTHS * torch.linspace(0.2, 1.1, 10)  # sums over each answer of log sum_v pi_v^2


def made_up(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps]:
    """Summed log-probs of five pairs under a policy, which takes gradients, and a reference near it."""
    generator = torch.Generator().manual_seed(seed)
    sums = [-LENGTHS[part] * (0.2 + 2 * torch.rand(5, generator=generator)) for part in (slice(5), slice(5, None))]
    policy = PairLogps(*(side.to(dtype, copy=True).requires_grad_() for side in sums))
    reference = PairLogps(*((side + 3 * torch.randn(5, generator=generator)).to(dtype) for side in sums))
    return policy, reference
