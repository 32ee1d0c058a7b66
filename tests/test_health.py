"""Whatever an adapter is made of, on whatever base: each tensor has a gradient and moves, and the base does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from lorafocal.errors import UnhealthyRun
from lorafocal.model.load import load_base
from tests.tiny import VOCABULARY, lora, pairs, tiny_base, trainer, weights

pytestmark = pytest.mark.slow  # many small runs

DATA = pairs(12)
SEEN = {token for pair in DATA for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for token in ids}
OFTEN, NEVER = DATA[0].chosen_ids[0], next(token for token in range(VOCABULARY) if token not in SEEN)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return folder


class Gradients(TrainerCallback):
    """The largest entry of each tensor's gradient, a step; None where there is none."""

    def __init__(self, run) -> None:
        self.run = run
        self.steps: list[dict[str, float | None]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        largest = {n: None if p.grad is None else float(p.grad.abs().max()) for n, p in self.run.trained.items()}
        self.steps.append(largest)


def trained(folder, base, quantization, **adapter):
    model = load_base(str(base), dtype="bfloat16" if quantization else "float32", quantization=quantization)
    held = {p.data_ptr(): (p.dtype, type(p), p.detach().clone()) for p in model.parameters()}
    run = trainer(folder, DATA, DATA[:3], model=model, peft_config=lora(**adapter), max_steps=3, pairs_per_step=6)
    seen = Gradients(run)
    run.add_callback(seen)
    before = weights(run)
    run.evaluate()
    run.train()
    run.evaluate()
    return run, before, seen.steps, held


ADAPTERS = {  # every kind of tensor that is trained, in adapters of several kinds
    "lora, head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "dora, norm and tokens": {
        "use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": [OFTEN, NEVER]
    },
}  # fmt: skip


@pytest.mark.row("2", "39")
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_every_tensor_has_a_gradient_and_moves_and_the_base_stays_where_and_what_it_is(
    tmp_path, base, quantization, adapter
):
    run, before, steps, held = trained(tmp_path, base, quantization, **adapter)
    assert all(value is not None for step in steps for value in step.values())
    assert run.health.moved
    unmoved = [name for name, parameter in run.trained.items() if torch.equal(parameter, before[name])]
    assert not unmoved
    now = {parameter.data_ptr(): parameter for parameter in run.model.parameters()}
    for place, (dtype, kind, bits) in held.items():
        assert (now[place].dtype, type(now[place])) == (dtype, kind)
        assert torch.equal(now[place], bits)
        assert not now[place].requires_grad


def test_a_token_that_no_pair_has_gets_a_gradient_of_zeros_and_stays(tmp_path, base):
    run, before, steps, _ = trained(tmp_path, base, None, trainable_token_indices=[NEVER])
    [name] = [name for name in run.trained if "trainable_tokens" in name]
    assert [step[name] for step in steps] == [0.0, 0.0, 0.0]
    assert torch.equal(run.trained[name], before[name])


@pytest.mark.row("2", "39")
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", ["lora_magnitude_vector", "modules_to_save", "trainable_tokens"])
def test_a_tensor_of_any_kind_without_a_gradient_stops_the_first_step(tmp_path, base, quantization, kind):
    settings = {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [OFTEN]}
    model = load_base(str(base), dtype="bfloat16" if quantization else "float32", quantization=quantization)
    run = trainer(tmp_path, DATA, model=model, peft_config=lora(**settings))
    name = next(name for name in run.trained if kind in name)
    run.trained[name].requires_grad_(False)
    with pytest.raises(UnhealthyRun, match=rf"received no gradient \(first: .*{kind}"):
        run.train()
