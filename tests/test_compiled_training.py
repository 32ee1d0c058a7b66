"""Runs with compiled decoder layers: what rounds packs up takes no part in anything, and all else stays as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from lorafocal import assembly, comparison
from lorafocal.errors import InputError
from lorafocal.model.compiled import compile_layers, decoder_layers
from lorafocal.policy import evaluating, plain_attention
from lorafocal.trainer import FocalPOTrainer
from tests import tiny
from tests.tiny import lora, pairs, relative_difference, tiny_base, tiny_policy

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="torch 2.9 compiles no fused functions, and is refused"
)
BUCKET = 32
DATA, HELD_OUT = pairs(12), pairs(5, seed=4)
EVERY = {"max_steps": 4, "pairs_per_step": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.fixture(autouse=True)
def _graphs_in_seconds(monkeypatch):
    """Traced by autograd's compiler, run by torch: Inductor takes minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(assembly, "bucket_of", lambda tokens: BUCKET)
    monkeypatch.setattr(
        assembly, "compile_layers", lambda model, bucket: compile_layers(model, bucket, backend="aot_eager")
    )
    yield
    torch._dynamo.reset()


def made(folder: Path, *, compiled: bool = True, **settings: Any) -> FocalPOTrainer:
    given = {"model": tiny_base(dtype=torch.float64), "peft_config": lora(), "save_strategy": "steps", **EVERY}
    return tiny.trainer(folder, DATA, HELD_OUT, **given | {"compile_layers": compiled} | settings)


def logged(run: FocalPOTrainer) -> list[dict[str, float]]:
    timed = ("_per_s", "_runtime", "_per_second", "_gib")
    lines = [line for line in run.state.log_history if "loss" in line or "eval_loss" in line]
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in lines]


def weights(run: FocalPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}


def assert_same_run(ours: FocalPOTrainer, theirs: FocalPOTrainer, tolerance: float) -> None:
    assert len(logged(ours)) == len(logged(theirs)) > 4
    for line, expected in zip(logged(ours), logged(theirs), strict=True):
        assert line == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert relative_difference(weights(ours), weights(theirs)) < tolerance


class CompiledCalls:
    """Counts the calls of compiled layers and what rounds their packs up."""

    def __init__(self, run: FocalPOTrainer) -> None:
        self.count = 0
        for layer in decoder_layers(run.model):
            stand_in = layer.forward.__self__
            stand_in.compiled = self._counted(stand_in.compiled)

    def _counted(self, compiled):
        def call(layer, hidden, *args, **kwargs):
            assert hidden.shape[1] % BUCKET == 0
            self.count += 1
            return compiled(layer, hidden, *args, **kwargs)

        return call


@pytest.mark.engine
@pytest.mark.row("F16")
def test_a_run_with_evaluations_is_the_plain_one_and_goes_on_with_the_same_bits(tmp_path):
    plain, run = made(tmp_path / "plain", compiled=False), made(tmp_path / "run")
    calls = CompiledCalls(run)
    assert run.kernels["compiled"] == f"decoder layers, for multiples of {BUCKET} token rows"
    for one in (plain, run):
        one.train()
    assert calls.count > 40
    assert_same_run(run, plain, 1e-7)
    assert logged(run)[0]["rewards/ties"] == 1.0  # the live reference, switched off in the same graphs
    again = made(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(again).items())


@pytest.mark.engine
@pytest.mark.row("1")
def test_graphs_that_round_otherwise_without_gradients_are_not_taken_for_another_reference(tmp_path, monkeypatch):
    """As Inductor's may: sums in another order. The probe compares the layers themselves, by exactly 0 as ever."""

    def rounding(graph, _):
        def call(*given):
            found = graph(*given)
            return found if torch.is_grad_enabled() else tuple(value * (1 + 1e-9) for value in found)

        return call

    monkeypatch.setattr(
        assembly, "compile_layers", lambda model, bucket: compile_layers(model, bucket, backend=rounding)
    )
    plain, run = made(tmp_path / "plain", compiled=False), made(tmp_path / "run")
    calls = CompiledCalls(run)
    for one in (plain, run):
        one.train()
    assert calls.count > 40
    assert relative_difference(weights(run), weights(plain)) < 1e-3
    assert logged(run)[0]["rewards/ties"] < 1.0  # they did round otherwise
    other = made(tmp_path / "other", model=tiny_policy(trained=True, dtype=torch.float64), peft_config=None)
    with pytest.raises(InputError, match="by exactly 0"):
        other.train()
    monkeypatch.setattr(comparison, "is_compiled", lambda model: False)
    with pytest.raises(InputError, match="by exactly 0"):
        made(tmp_path / "off").train()


def test_lengths_are_few_where_a_pair_is_longer_than_a_pack(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(assembly, "bucket_of", lambda most: asked.append(most) or BUCKET)
    made(tmp_path, tokens_per_pack=8)
    made(tmp_path, tokens_per_pack=64)
    made(tmp_path, tokens_per_pack=8, objective="sft", reference=None)
    chosen = [len(pair.prompt_ids) + len(pair.chosen_ids) for pair in DATA + HELD_OUT]
    assert asked == [max(pair.shared_length for pair in DATA + HELD_OUT), 64, max(chosen)]


@pytest.mark.engine
def test_a_step_that_ran_out_of_memory_is_packed_again_in_whole_buckets(tmp_path, monkeypatch):
    settings = {"tokens_per_pack": 4 * BUCKET}
    plain, run = made(tmp_path / "plain", compiled=False, **settings), made(tmp_path / "run", **settings)
    calls, token_logps, rows = CompiledCalls(run), comparison.token_logps, []

    def limited(model: Any, pack: Any, *more: Any) -> Any:
        if pack.num_rows > 2 * BUCKET:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(pack.num_rows)
        return token_logps(model, pack, *more)

    plain.train()
    monkeypatch.setattr(comparison, "token_logps", limited)
    run.train()
    assert run._retry.shrunk
    assert {*rows} <= {BUCKET, 2 * BUCKET}
    assert calls.count > 40
    assert_same_run(run, plain, 1e-7)


@pytest.mark.engine
def test_a_stored_reference_says_that_compiled_layers_computed_it(tmp_path):
    settings = {"reference": "cached", "reference_store": str(tmp_path / "store")}
    run, live = made(tmp_path / "run", **settings), made(tmp_path / "live")
    run.cache_reference()
    [context] = (tmp_path / "store").glob("*/context.json")
    assert "compiled" in json.loads(context.read_text())["kernels"]
    for one in (run, live):
        one.train()
    assert relative_difference(weights(run), weights(live)) < 1e-6
    uncompiled = made(tmp_path / "other", compiled=False, **settings)
    assert uncompiled.cache_reference().found == 0


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(tmp_path):
    run = made(tmp_path)
    copied = copy.deepcopy(run.model)
    for parameter in copied.get_base_model().model.layers.parameters():
        parameter.data.zero_()
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad(), plain_attention(copied), evaluating(copied):
        hidden = copied.get_base_model().model(ids).last_hidden_state
        base = copied.get_base_model().model
        torch.testing.assert_close(hidden, base.norm(base.embed_tokens(ids)))


def test_a_second_trainer_on_the_model_computes_as_it_says(tmp_path):
    """The first one's fused functions and compiled layers are taken away, and put back where they are asked for."""
    run = made(tmp_path / "a")
    plain = made(tmp_path / "b", compiled=False, model=run.model, peft_config=None, adapter_kernels="peft")
    assert plain.kernels["adapters"] == "PEFT's own"
    assert not [module for module in plain.model.modules() if "forward" in vars(module)]
    again = made(tmp_path / "c", model=run.model, peft_config=None)
    assert again.kernels["compiled"] == run.kernels["compiled"]
    assert again.data_collator.bucket == BUCKET
