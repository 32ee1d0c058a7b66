"""A recipe of all parameters rehearsed on one GPU, by every engine that is installed: bf16, and what it then weighs."""

from __future__ import annotations

import importlib.util

import pytest

from tests.engine import launches

pytestmark = pytest.mark.gpu

DEEPSPEED = ["zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
RECIPE = "configs/paper/llama3-8b-focalpo.yaml"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *DEEPSPEED])
def test_a_recipe_rehearses_on_a_gpu(engine: str) -> None:
    """Its loss at step 0 is FocalPO's where policy and reference agree; the saved model scores as the run did."""
    command = ["lorafocal", "train", RECIPE, "--tiny", "--engine", engine, "--processes", "1"]
    code, output = launches.run(command, cwd=str(launches.REPOSITORY))
    assert code == 0, output
    assert "loss 0.669536 at the first" in output
    assert "the saved model, loaded again, scores 4 held-out pairs as the run did" in output
    assert "training.use_cpu" not in output


def test_adapters_train_on_a_base_in_parts() -> None:
    """Quantised to 4 bits and split by FSDP2, on the config of one GPU."""
    command = ["lorafocal", "train", "configs/paper/qlora/llama3-8b-focalpo.yaml", "--tiny", "--engine", "fsdp2"]
    code, output = launches.run(
        [*command, "--processes", "1", "training.optim=adamw_torch"], cwd=str(launches.REPOSITORY)
    )
    assert code == 0, output
    assert "loss 0.669536 at the first" in output
