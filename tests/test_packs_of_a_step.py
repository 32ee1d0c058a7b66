"""A step of several packs is one step: one optimiser step, gradients that add up, flags that say so to engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.engine import ragged_run
from tests.tiny import pairs, relative_difference, tiny_policy, trainer


@pytest.mark.row("F3")
def test_engines_are_told_of_the_last_backward_and_the_optimiser_steps_once(tmp_path: Path) -> None:
    steps = ragged_run.ragged_run(tmp_path)["steps"]
    assert len(steps) == ragged_run.STEPS
    assert max(step["packs"] for step in steps) >= 3
    for step in steps:
        assert step["flags"] == [False] * (step["packs"] - 1) + [True]
        assert step["optimizer_steps"] == 1


@pytest.mark.row("F3", "15")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_gradients_of_many_packs_are_those_of_one(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    def gradients(tokens: int) -> tuple[int, dict[str, torch.Tensor]]:
        made = trainer(
            tmp_path, pairs(12), model=tiny_policy(dtype=dtype), tokens_per_pack=tokens, identity_probe=False
        )
        made.create_optimizer_and_scheduler(4)
        batch = made.data_collator(made.train_dataset)
        made.training_step(made.model, batch)
        return len(batch.packs), {name: p.grad.clone() for name, p in made.trained.items() if p.grad is not None}

    (one, whole), (many, split) = gradients(10_000), gradients(40)
    assert one == 1 < 4 <= many
    assert relative_difference(split, whole) < tolerance


@pytest.mark.slow
@pytest.mark.row("F1", "F2")
def test_every_epoch_trains_each_pair_once_in_another_order(tmp_path: Path) -> None:
    steps = ragged_run.ragged_run(tmp_path)["steps"]
    half = ragged_run.STEPS // ragged_run.EPOCHS
    epochs = [[i for step in part for i in step["ids"]] for part in (steps[:half], steps[half:])]
    assert [len(step["ids"]) for step in steps[:half]] == [8, 8, 1]
    assert all(Counter(epoch) == Counter(f"pair-{n}" for n in range(ragged_run.PAIRS)) for epoch in epochs)
    assert set(epochs[0][:5]) != set(epochs[1][:5])
