"""The cells that must train: each one run through the trainer, its last step held against PEFT's own forward.

The twin (tests/peft_twin.py) says in float64 what the step is, and in the base's own dtype how far rounding alone takes
a right implementation from that: ours may be three times as far, since it rounds in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from lorafocal.model.adapters import adapter_parameters, attach_lora
from lorafocal.model.load import load_base
from lorafocal.objectives.focal import identity_loss
from lorafocal.trainer import FocalPOTrainer
from tests.compatibility_table import PROVED_ADAPTERS, PROVED_BASES, PROVED_REFERENCES, PROVED_WITH_LORA
from tests.peft_twin import Step, Tensors, as_float, step_of
from tests.tiny import lora, pairs, relative_difference, tiny_base, trainer

pytestmark = pytest.mark.slow  # many small runs

FURTHER = 3  # than the twin in the base's own dtype; where the CPU multiplies in bf16 itself it was 2.2
STEPS = 3
PAIRS = pairs(4)
ADAPTERS = {"lora": lora, "rslora": partial(lora, use_rslora=True), "dora": partial(lora, use_dora=True)}
MUST_TRAIN = [
    *((base, adapter, reference) for base in PROVED_BASES for adapter in ADAPTERS for reference in PROVED_REFERENCES),
    *((base, "lora", "disabled_adapter") for base in (*PROVED_WITH_LORA, "nf4 in bfloat16", "int8 in bfloat16")),
]
assert {*ADAPTERS} == {*PROVED_ADAPTERS}
# What a layout changes meets each base, each adapter and reference, and on each base the adapter that computes most.
CELLS = [(*cell, "packed") for cell in MUST_TRAIN] + [
    (base, adapter, reference, "padded")
    for base, adapter, reference in MUST_TRAIN
    if base == "float32" or (adapter, reference) in {("lora", "disabled_adapter"), ("dora", "frozen_copy")}
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(path)
    return str(path)


def base_in(word: str, folder: str, device: str = "cpu") -> PreTrainedModel:
    """The tiny base in float32 or bfloat16, or quantised; quantised ones compute in float32 unless the word says so."""
    held, _, dtype = word.partition(" in ")
    if held in ("float32", "bfloat16"):
        return load_base(folder, dtype=held, device=torch.device(device))
    return load_base(folder, dtype=dtype or "float32", quantization=held, device=torch.device(device))


@dataclass(frozen=True)
class Run:
    """What a run left: its logged losses, its last step with the adapter's values in it, and those it began with."""

    losses: list[float]
    last: Step
    start: Tensors
    now: Tensors


class LastStep(TrainerCallback):
    """The adapter and its gradients, as the optimiser meets them (clipping is off)."""

    def __init__(self, made: FocalPOTrainer) -> None:
        self.trained = made.trained
        self.values: Tensors = {}
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values = values_of(self.trained)
        self.gradients = {name: p.grad.double().cpu() for name, p in self.trained.items()}


def values_of(adapter: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter.items()}


def trained(folder: Path, base: PreTrainedModel, adapter: str, reference: str, **settings: Any) -> Run:
    """Three steps on all pairs: of a fresh adapter against the base, or of one trained before against its copy."""
    model: Any = base
    if reference == "frozen_copy":
        torch.manual_seed(3)
        model = moved(attach_lora(base, ADAPTERS[adapter]()))
    else:
        settings["peft_config"] = ADAPTERS[adapter]()
    defaults = {"max_steps": STEPS, "pairs_per_step": len(PAIRS), "tokens_per_pack": 40, "learning_rate": 3e-2}
    made = trainer(folder, PAIRS, model=model, reference=reference, max_grad_norm=0.0, **defaults | settings)
    start, seen = values_of(made.trained), LastStep(made)
    made.add_callback(seen)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return Run(losses, Step(losses[-1], seen.gradients), start, seen.values)


def moved(policy: Any) -> Any:
    """Every tensor of the adapter away from its start."""
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter_parameters(policy).values():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.data += noise * (parameter.data if parameter.ndim == 1 else 1)  # magnitudes stay near norms
    return policy


Twins = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module")
def twins_of(folder: str) -> Callable[[str], Twins]:
    """The float64 model that a base stands for, and the same in the base's own dtype."""

    @cache
    def made(word: str) -> Twins:
        base = base_in(word, folder)
        return as_float(base, torch.float64), as_float(base, base.dtype)

    return made


def check_against_twin(run: Run, twins: Twins, adapter: str, reference: str) -> None:
    """Loss and gradients of the last step, no further from float64 than rounding in the base's dtype explains."""
    start = None if reference == "disabled_adapter" else run.start
    exact, rounded = (step_of(twin, ADAPTERS[adapter](), PAIRS, start=start, now=run.now) for twin in twins)
    allowed = FURTHER * relative_difference(rounded.gradients, exact.gradients)
    assert relative_difference(run.last.gradients, exact.gradients) <= allowed
    assert all(gradient.norm() > 0 for gradient in run.last.gradients.values())
    # A loss is one number, whose error may happen to be small: what counts is the rounding of its gradients.
    assert run.last.loss == pytest.approx(exact.loss, rel=allowed)


def bytes_of(base: torch.nn.Module) -> dict[str, bytes]:
    """Every tensor of a base, its quantisation scales included, as it lies in memory; not its adapter's."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): tensor.contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.row("6", "1", "15", "44")
@pytest.mark.parametrize(("base", "adapter", "reference", "layout"), CELLS)
def test_a_cell_trains_as_pefts_own_forward_would(
    tmp_path: Path,
    folder: str,
    twins_of: Callable[[str], Twins],
    base: str,
    adapter: str,
    reference: str,
    layout: str,
) -> None:
    """It starts at the identity loss, moves every tensor of the adapter, and leaves the base's bytes alone."""
    model = base_in(base, folder)
    before = bytes_of(model)
    run = trained(tmp_path, model, adapter, reference, layout=layout)
    assert run.losses[0] == pytest.approx(identity_loss(0.05), abs=1e-6) == pytest.approx(0.669536, abs=1e-6)
    assert run.losses[-1] < run.losses[0]
    assert not any(torch.equal(run.now[name], tensor) for name, tensor in run.start.items())
    assert bytes_of(model) == before
    check_against_twin(run, twins_of(base), adapter, reference)


@pytest.mark.gpu
@pytest.mark.row("6", "1", "15")
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("base", ["bfloat16", "nf4", "nf4 in bfloat16", "int8 in bfloat16"])
@pytest.mark.parametrize("reference", PROVED_REFERENCES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_cell_trains_as_pefts_own_forward_would_on_a_gpu(
    tmp_path: Path, folder: str, base: str, adapter: str, reference: str, layout: str
) -> None:
    """There bitsandbytes rounds what an 8-bit layer reads, too, so the rounded twin has the quantised layers itself."""
    run = trained(tmp_path, base_in(base, folder, "cuda"), adapter, reference, layout=layout, use_cpu=False)
    assert run.losses[0] == pytest.approx(identity_loss(0.05), abs=1e-6)
    held = base_in(base, folder, "cuda")
    check_against_twin(run, (as_float(held, torch.float64), held), adapter, reference)
