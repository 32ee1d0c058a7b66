"""All fast paths at once against none: packs, fused functions and stored references; padded rows, PEFT, live ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorafocal.caching import answers_of, score
from lorafocal.data.packing import StepBatch
from lorafocal.data.tokens import TokenizedPair
from lorafocal.trainer import FocalPOTrainer
from tests import tiny
from tests.tiny import lora, pairs, relative_difference, tiny_base

STEPS = 20
DATA = pairs(24, longest=20)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ALL_OFF = {"layout": "padded", "adapter_kernels": "peft", "reference": "disabled_adapter"}


def made(folder: Path, dtype: torch.dtype, **settings: Any) -> FocalPOTrainer:
    defaults = {"max_steps": STEPS, "tokens_per_pack": 150, "pairs_per_step": 8, "learning_rate": 2e-2}
    defaults["identity_probe"] = False  # for each step looks like the first one here
    run = tiny.trainer(folder, DATA, model=tiny_base(dtype=dtype), peft_config=lora(), **(defaults | settings))
    run.create_optimizer_and_scheduler(STEPS)
    return run


def look_up(run: FocalPOTrainer) -> None:
    """From the store; in float64, whose digits a store of fp32 sums has not, from the pass that fills it."""
    if run.trained[next(iter(run.trained))].dtype == torch.float32:
        run.cache_reference()
        run.look_up_reference()
        return
    answers = list(answers_of(DATA))
    known = {one.answer.key: one.logps for one in score(run.model, [(a,) for a in answers], run.data_collator)}
    of_pairs = zip(answers[::2], answers[1::2], strict=True)
    run.data["train_dataset"].pairs[:] = [
        replace(pair, reference=(known[chosen.key], known[rejected.key]))
        for pair, (chosen, rejected) in zip(DATA, of_pairs, strict=True)
    ]


def norm_in_its_own_dtype(self: Any, x: Tensor) -> Tensor:
    """transformers rounds to fp32 within, so that in float64 two orders of adding up differ by 1e-8 after all."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def steps_of(run: FocalPOTrainer) -> list[list[TokenizedPair]]:
    loader, found = run.get_train_dataloader(), []
    while len(found) < STEPS:
        loader.batch_sampler.epoch = len(found)
        found += [list(batch.pairs) for batch in loader]
    return found[:STEPS]


def gradients(run: FocalPOTrainer, batch: StepBatch) -> dict[str, Tensor]:
    for parameter in run.trained.values():
        parameter.grad = None
    run.training_step(run.model, batch)
    return {name: parameter.grad.clone() for name, parameter in run.trained.items() if parameter.grad is not None}


@pytest.mark.slow
@pytest.mark.row("35")
@pytest.mark.parametrize(
    ("dtype", "tier"),
    [(torch.float32, "none"), (torch.float32, "mlp"), (torch.float64, "none"), (torch.float64, "mlp")],
)
def test_along_a_trajectory_gradients_are_those_without_any_fast_path(tmp_path, monkeypatch, dtype, tier):
    if dtype == torch.float64:
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_its_own_dtype)
    stored = {"reference": "cached", "reference_store": str(tmp_path / "store")}
    fast = made(tmp_path / "fast", dtype, recompute=tier, **stored)
    plain = made(tmp_path / "plain", dtype, **ALL_OFF)
    look_up(fast)
    assert "2 MLP blocks, 2 shared inputs, 2 linear layers, 5 norms, 2 rotary embeddings" in fast.kernels["adapters"]
    assert plain.kernels["adapters"] == "PEFT's own"
    worst = 0.0
    for step in steps_of(fast):
        known = {pair.id: pair for pair in fast.data["train_dataset"].pairs}
        ours = gradients(fast, fast.data_collator([known[pair.id] for pair in step]))
        theirs = gradients(plain, plain.data_collator(step))
        assert ours.keys() == fast.trained.keys()
        worst = max(worst, relative_difference(ours, theirs))
        fast.optimizer.step()
        with torch.no_grad():
            for name, parameter in plain.trained.items():
                parameter.copy_(fast.trained[name])
    assert worst < TOLERANCE[dtype]
    moved = [float(parameter.detach().abs().max()) for name, parameter in fast.trained.items() if "lora_B" in name]
    assert min(moved) > 0.01  # far from the start, where much is zero
