"""All answers that a pair's row has, as one set: its chosen and its rejected answer, and further ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorafocal.objectives.inputs import OtherAnswers, PairLogps, PairScores
from lorafocal.objectives.pairwise import widen


class Sets(NamedTuple):
    """The A answers of B sets, one a pair; each set has two or more."""

    rewards: Tensor  # (A,) beta * log-ratio
    scores: Tensor  # (A,) float64, a judge's
    pair: Tensor  # (A,) int64 in [0, B)
    num_sets: int  # B

    @classmethod
    def of(
        cls, policy: PairLogps, reference: PairLogps, scores: PairScores, others: OtherAnswers | None, *, beta: float
    ) -> Sets:
        """Those of B pairs and M further answers: A = 2B + M.

        Raises ValueError for further answers without scores, or without the reference's log-probs.
        """
        count = len(policy.chosen)
        pair = torch.arange(count, device=policy.chosen.device).repeat(2)
        logratios = [widen(ours) - widen(theirs) for ours, theirs in zip(policy, reference, strict=True)]
        judged = list(scores)
        if others is not None:
            if others.reference is None or others.scores is None:
                raise ValueError("further answers of a set need scores, and log-probs under the reference")
            pair = torch.cat((pair, others.pair))
            logratios.append(widen(others.logps) - widen(others.reference))
            judged.append(others.scores)
        return cls(beta * torch.cat(logratios), torch.cat([each.double() for each in judged]), pair, count)

    def mean(self, values: Tensor) -> Tensor:
        """(A,) to the mean of each set, (B,)."""
        return self._reduced(values, "mean")

    def largest(self, values: Tensor) -> Tensor:
        """(A,) to the largest of each set, (B,)."""
        return self._reduced(values, "amax")

    def total(self, values: Tensor) -> Tensor:
        """(A,) to the sum over each set, (B,)."""
        return values.new_zeros(self.num_sets).index_add(0, self.pair, values)

    def logsumexp(self, values: Tensor) -> Tensor:
        """(A,) to the logarithm of each set's summed exponentials, (B,)."""
        largest = self.largest(values.detach())
        return largest + self.total((values - largest[self.pair]).exp()).log()

    def log_softmax(self, values: Tensor) -> Tensor:
        """(A,) to the logarithm of each answer's share in its set, (A,)."""
        return values - self.logsumexp(values)[self.pair]

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        return values.new_zeros(self.num_sets).scatter_reduce(0, self.pair, values, how, include_self=False)
