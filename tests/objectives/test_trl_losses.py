"""Every loss that TRL has against TRL's own step, on made-up log-probs in place of a model's."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer

from lorafocal.objectives import build_objective
from tests.objectives.batch import Batch, slopes

pytestmark = (
    pytest.mark.newest
)  # stands in for what TRL's step asks of its trainer, which earlier releases have otherwise

BATCH = Batch(6)
LOSSES = [
    ("dpo", "sigmoid", {"beta": 0.4}),
    ("robust-dpo", "robust", {"beta": 0.4, "label_smoothing": 0.1}),
    ("robust-dpo", "robust", {"beta": 1.0, "label_smoothing": 0.4}),
    ("dpo-norm", "sigmoid_norm", {"beta": 5.0}),
    ("hinge", "hinge", {"beta": 0.05}),
    ("hinge", "hinge", {"beta": 0.4}),
    ("exo", "exo_pair", {"beta": 0.4, "label_smoothing": 1e-3}),
    ("discopop", "discopop", {"beta": 0.05, "tau": 0.05}),
    ("discopop", "discopop", {"beta": 0.4, "tau": 0.5}),
    ("sppo-hard", "sppo_hard", {"beta": 1e-3}),
    ("irpo", "sigmoid+sft", {"beta": 0.4, "nll_weight": 1.0}),
    ("irpo", "sigmoid+sft", {"beta": 0.4, "nll_weight": 0.2}),
    ("f-dpo-forward-kl", "forward_kl", {"beta": 0.01}),
    ("f-dpo-js", "js_divergence", {"beta": 0.4}),
    ("ipo", "ipo", {"tau": 0.1}),
]
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


def trainer(
    loss_type: str,
    *,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
    nll_weight: float = 0.0,
    alpha: float = 0.5,
) -> SimpleNamespace:
    """What TRL's step reads of its trainer; its means over processes are those of one."""
    divergence = loss_type if loss_type in DIVERGENCES else "reverse_kl"
    types = ["sigmoid"] if divergence == loss_type else loss_type.split("+")
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=tau),
        loss_types=types,
        loss_weights=[1.0, nll_weight][: len(types)],
        beta=tau if beta is None else beta,  # what IPO's paper calls tau
        label_smoothing=label_smoothing,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=1 - alpha,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def by_trl(loss_type: str, pair: int, logps: tuple[Tensor, Tensor], **parameters: float) -> Tensor:
    """TRL's loss of one pair, whose answers have these summed log-probs, spread evenly over their tokens."""
    lengths = [int(side[pair]) for side in BATCH.both("n")]
    row = torch.arange(1, max(lengths) + 1)
    mask = torch.stack([row <= length for length in lengths])
    by_token = torch.stack(
        [side[pair] / length * held for side, length, held in zip(logps, lengths, mask, strict=True)]
    )
    outputs = SimpleNamespace(
        log_probs=by_token,
        entropy=torch.zeros_like(by_token),
        mean_logits=torch.zeros_like(by_token),
        is_top1=torch.zeros_like(mask),
    )
    completion = torch.nn.functional.pad(mask.long(), (1, 0))  # one token of prompt
    reference = [side[pair : pair + 1].to(by_token.dtype) for side in BATCH.both("b")]
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(trainer(loss_type, **parameters), lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(("name", "loss_type", "parameters"), LOSSES)
def test_values_and_slopes_are_those_of_trl(name: str, loss_type: str, parameters: dict[str, float]) -> None:
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-12  # there TRL takes logarithms of e in float32
    ours, theirs = BATCH.policy(), BATCH.policy()
    out = BATCH(build_objective(name, focal=None, guard=None, **parameters), ours)
    losses = torch.stack([by_trl(loss_type, pair, theirs, **parameters) for pair in range(len(BATCH.pairs))])
    torch.testing.assert_close(out.losses, losses, rtol=rtol, atol=1e-15)
    for mine, yours in zip(slopes(out, ours), torch.autograd.grad(losses.sum(), list(theirs)), strict=True):
        torch.testing.assert_close(mine, yours, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_alpha_divergence_is_trl_s_by_1_less_its_coefficient(alpha: float) -> None:
    """In float32, the widest that TRL computes it in."""
    ours, theirs = BATCH.policy(torch.float32), BATCH.policy(torch.float32)
    out = BATCH(build_objective("f-dpo-alpha", beta=0.01, alpha=alpha), ours)
    losses = [by_trl("alpha_divergence", pair, theirs, beta=0.01, alpha=alpha) for pair in range(len(BATCH.pairs))]
    torch.testing.assert_close(out.losses, torch.stack(losses), rtol=2e-4, atol=1e-6)
    for mine, yours in zip(slopes(out, ours), torch.autograd.grad(sum(losses), list(theirs)), strict=True):
        torch.testing.assert_close(mine, yours, rtol=2e-4, atol=1e-6)
