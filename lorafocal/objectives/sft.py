"""Supervised fine-tuning on the chosen answers: the stage before preferences."""

from __future__ import annotations

from torch import Tensor

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import PairLosses, widen


def sft(policy: PairLogps, *, lengths: Tensor) -> PairLosses:
    """-log pi(chosen) divided by the chosen answer's tokens: nats a token, a pair at a time, (B,); no rewards.

    `lengths` are the completion tokens, (2B,), chosen first. A step's loss is the mean of these means over its pairs,
    so each pair weighs the same, as in the preference stages, and a step splits exactly over packs and processes.
    (A mean over all tokens of a step would weigh a pair by its length.) A pair's value and gradient are those of
    transformers' own loss on that sequence alone with the prompt masked.
    """
    losses = -widen(policy.chosen) / lengths[: len(policy.chosen)]
    none = losses.detach().new_zeros(0)
    return PairLosses(losses, none, none)
