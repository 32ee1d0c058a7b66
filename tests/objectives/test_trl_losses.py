"""DPO, rDPO and length-normalised DPO against TRL's own step, on made-up log-probs in place of a model's."""

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
]


def trainer(loss_type: str, *, beta: float, label_smoothing: float = 0.0) -> SimpleNamespace:
    """What TRL's step reads of its trainer; its means over processes are those of one."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
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
    reference = [side[pair : pair + 1] for side in BATCH.both("b")]
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
    ours, theirs = BATCH.policy(), BATCH.policy()
    out = BATCH(build_objective(name, focal=None, guard=None, **parameters), ours)
    losses = torch.stack([by_trl(loss_type, pair, theirs, **parameters) for pair in range(len(BATCH.pairs))])
    torch.testing.assert_close(out.losses, losses, rtol=1e-12, atol=1e-15)
    for mine, yours in zip(slopes(out, ours), torch.autograd.grad(losses.sum(), list(theirs)), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-12, atol=1e-15)
