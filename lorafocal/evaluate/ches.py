"""CHES: how alike a model's hidden states of two answers are, which foretells that training makes both less likely.

Source: Razin et al. 2024, arXiv:2410.08847, "Unintentional Unalignment: Likelihood Displacement in Direct Preference
Optimization", Definition 2 and its length-normalised form; positions and last layer as in the paper's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafocal.data.packing import CompletionIndex, Pack
from lorafocal.model.head import causal_lm
from lorafocal.model.trained_modules import plain_modules
from lorafocal.objectives.inputs import PairLogps
from lorafocal.policy import sequence_logps


class Ches(NamedTuple):
    """CHES scores of B pairs, float64; the higher, the likelier is it that the chosen answer falls with the other."""

    plain: Tensor  # (B,) <S_w, S_l> - |S_w|^2, S being an answer's sum of hidden states
    normalised: Tensor  # (B,) the same of their means


def ches(states: Tensor, index: CompletionIndex) -> Ches:
    """Of the rows (N, D) that predict the completion tokens of `index`, as the output head takes them.

    These are the last layer's hidden states from the last token of the prompt to the last but one of the answer.
    """
    sums = torch.segment_reduce(states.double(), "sum", lengths=index.lengths, axis=0, unsafe=True)
    return Ches(_centred(sums), _centred(sums / index.lengths[:, None]))


def _centred(of_answers: Tensor) -> Tensor:
    """(2B, D), chosen first, to (B,)."""
    chosen, rejected = of_answers.chunk(2)
    return (chosen * (rejected - chosen)).sum(-1)


def logps_and_ches(model: nn.Module, pack: Pack) -> tuple[PairLogps, Ches]:
    """The log-probs of a pack's B pairs and their CHES, of one forward."""
    with _head_inputs(model) as states:
        logps = sequence_logps(model, pack)
    return logps, ches(torch.cat(states), pack.index)


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the rows that the model's log-prob head scores are kept, (N, D) a call."""
    kept: list[Tensor] = []

    def keep(head: Any, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].detach().flatten(0, -2)
        kept.append(flat if head.rows is None else flat[head.rows])

    hooks = [head.register_forward_pre_hook(keep) for head in plain_modules(causal_lm(model).get_output_embeddings())]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
