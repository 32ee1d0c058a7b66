"""Training computes what evaluation does, whatever a family draws at random while it trains."""

from __future__ import annotations

import pytest
import torch

from lorafocal.model.noise import switch_noise_off
from tests.model.families import known_families, random_model

pytestmark = pytest.mark.slow

IDS = torch.arange(2, 20)[None]


def noisy(family: str) -> torch.nn.Module:
    """The family's model in training, with every dropout and jitter that it knows of at 0.3."""
    model = random_model(family)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("jitter" in name or "dropout" in name or name == "p"):
                setattr(module, name, 0.3)
    return model.train()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(torch.initial_seed() + 1)
    return model(IDS, use_cache=False).logits


@pytest.mark.row("14")
@pytest.mark.parametrize("family", known_families())
def test_a_family_computes_in_training_what_it_does_in_evaluation(family):
    model = noisy(family)
    switch_noise_off(model)
    torch.testing.assert_close(logits(model), logits(model.eval()), rtol=0, atol=1e-9)
    assert switch_noise_off(model) == 0


@pytest.mark.row("14")
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phimoe"])
def test_left_on_it_draws(family):
    model = noisy(family)
    assert not torch.allclose(logits(model), logits(model))
    assert switch_noise_off(model)
    assert torch.equal(logits(model.train()), logits(model.train()))
