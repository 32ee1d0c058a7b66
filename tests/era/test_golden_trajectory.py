"""Ten fp32 full-parameter steps against those of TRL 0.11.4: the same rows and start, DPO and Eq. 4 of the paper.

From text to weights: their two padded batches a step and live copy of the start, our packs and separate model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from lorafocal import FocalPOConfig, FocalPOTrainer
from lorafocal.comparison import Compared, Comparison
from lorafocal.sampler import shuffled
from tests.era.golden import golden
from tests.era.subjects import (
    BETA,
    GAMMA,
    PAIRS_PER_STEP,
    SETTINGS,
    STEPS,
    TRAINING_LIMITS,
    all_tokenizers,
    fill,
    model_config,
    summary,
    training_rows,
)

SEED = 3


class Noted(Comparison):
    """Keeps what was compared, by pair: policy chosen and rejected, reference chosen and rejected, in nats."""

    def __init__(self, made: Comparison) -> None:
        super().__init__(made.objective, made.kind, made.ref_model, noisy=made.noisy)
        self.scored: dict[str, list[float]] = {}
        self.losses: dict[str, float] = {}
        self.packs = 0

    def __call__(self, model: Any, part: Any) -> Compared:
        found = super().__call__(model, part)
        four = torch.stack([*found.policy, *found.reference], dim=-1)  # type: ignore[misc]
        self.scored |= zip(part.pack.pair_ids, four.tolist(), strict=True)
        self.losses |= zip(part.pack.pair_ids, found.losses.losses.tolist(), strict=True)
        self.packs += 1
        return found


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.found.append(float(logs["grad_norm"]))


def ours(folder: Path, gamma: float) -> tuple[Noted, list[float], Any]:
    """Trained on the rows in TRL's order, whatever ours is."""
    tokenizer = all_tokenizers()["zephyr"]
    policy, reference = (fill(LlamaForCausalLM(model_config(len(tokenizer)))) for _ in range(2))
    max_length, max_prompt_length = TRAINING_LIMITS
    rows = training_rows()
    placed = dict(zip(shuffled(len(rows), SEED, 0), range(len(rows)), strict=True))
    norms = Norms()
    args = FocalPOConfig(
        output_dir=str(folder), beta=BETA, gamma=gamma, pairs_per_step=PAIRS_PER_STEP, tokens_per_pack=400, seed=SEED,
        truncation="recipe", max_length=max_length, max_prompt_length=max_prompt_length, reference="separate_model",
        **SETTINGS,
    )  # fmt: skip
    trainer = FocalPOTrainer(
        policy, reference, args=args, processing_class=tokenizer, callbacks=[norms],
        train_dataset=[{"id": str(placed[i]), **rows[placed[i]]} for i in range(len(rows))],
    )  # fmt: skip
    trainer.compared = noted = Noted(trainer.compared)
    trainer.train()
    return noted, norms.found, trainer.model


def relative(a: Any, b: Any) -> float:
    """Largest relative difference."""
    a, b = torch.tensor(a).double(), torch.tensor(b).double()
    assert a.shape == b.shape
    return float(((a - b) / b).abs().max())


@pytest.mark.slow
@pytest.mark.row("28", "64")
@pytest.mark.parametrize(("name", "gamma"), [("dpo", 0.0), ("focalpo", GAMMA)])
def test_ten_steps_are_those_of_trl_0_11_4(tmp_path: Path, name: str, gamma: float) -> None:
    """Log-probs of every pair when its step came; losses and gradient norms of every step; the weights at the end."""
    wanted = golden()[name]
    noted, norms, model = ours(tmp_path, gamma)
    assert noted.packs > STEPS  # steps were split
    order = [str(place) for place in range(STEPS * PAIRS_PER_STEP)]
    scored = [noted.scored[place] for place in order]
    losses = torch.tensor([noted.losses[place] for place in order]).double().view(STEPS, -1).mean(-1)
    assert relative(scored[:PAIRS_PER_STEP], wanted["logps"][:PAIRS_PER_STEP]) <= 1e-6
    assert relative(scored, wanted["logps"]) <= 1e-5
    assert relative(losses.tolist(), wanted["losses"]) <= 5e-5
    assert relative(norms, wanted["gradient_norms"]) <= 1e-4
    found = summary(model)
    assert found.keys() == wanted["parameters"].keys()
    for parameter, (norm, product) in found.items():
        their_norm, their_product = wanted["parameters"][parameter]
        assert abs(norm - their_norm) <= 1e-5 * their_norm, parameter
        assert abs(product - their_product) <= 1e-5 * their_norm, parameter
