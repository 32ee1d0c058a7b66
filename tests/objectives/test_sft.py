"""Supervised fine-tuning on the chosen answers: transformers' own loss, and nothing computed that it does not need."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lorafocal import comparison
from lorafocal.data.packing import PairCollator
from lorafocal.evaluations import evaluation_files
from lorafocal.objectives import PairLogps, build_objective, mean_loss
from lorafocal.policy import prepare_policy, sequence_logps
from tests.tiny import adapter_gradients, pairs, relative_difference, tiny_policy, trainer

SFT = build_objective("sft")


def transformers_loss(model, pair) -> torch.Tensor:
    """The model's own causal-LM loss of one sequence, the prompt masked."""
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    labels = ids.clone()
    labels[0, : len(pair.prompt_ids)] = -100
    return model(input_ids=ids, labels=labels).loss


def step(model, batch, layout, budget=10_000) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each pair's loss in the order of the data, and the gradients of the step."""
    model.zero_grad()
    losses = {}
    for pack in PairCollator(layout, budget, rejected=False)(batch).packs:
        out = SFT(sequence_logps(model, pack), None, pack.index.lengths)
        mean_loss(out.losses, len(batch)).backward()
        losses |= dict(zip(pack.pair_ids, out.losses.detach(), strict=True))
    return torch.stack([losses[pair.id] for pair in batch]), adapter_gradients(model)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 45, 10_000])
def test_each_pair_is_transformers_own_loss_and_the_step_their_mean(kind, layout, budget):
    batch = pairs(7)
    plain = tiny_policy(kind, torch.float64)
    ours = copy.deepcopy(plain)
    prepare_policy(ours, layout=layout)
    losses, gradients = step(ours, batch, layout, budget)
    expected = torch.stack([transformers_loss(plain, pair) for pair in batch])
    expected.mean().backward()
    torch.testing.assert_close(losses, expected.detach().double(), rtol=1e-6, atol=1e-6)  # theirs is in fp32
    assert relative_difference(gradients, adapter_gradients(plain)) < 1e-6


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rejected_answers_are_in_no_row_and_move_no_bit(layout):
    batch = pairs(7)
    model = tiny_policy()
    prepare_policy(model, layout=layout)
    [pack] = PairCollator(layout, 10_000, rejected=False)(batch).packs
    if layout == "packed":
        assert pack.num_rows == sum(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in batch)
    else:
        assert pack.input_ids.shape[0] == len(batch)
    assert len(pack.index.positions) == sum(len(pair.chosen_ids) for pair in batch)
    assert sequence_logps(model, pack).rejected.tolist() == [0.0] * len(batch)  # log 1: there is nothing to say
    other = [replace(pair, rejected_ids=[5] * 40) for pair in batch]
    for ours, theirs in zip(step(model, batch, layout), step(model, other, layout), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_padded_packs_fill_the_budget_with_one_row_a_pair():
    batch = [replace(pair, prompt_ids=[1, 2], chosen_ids=[3] * 3) for pair in pairs(8)]
    sizes = [pack.num_pairs for pack in PairCollator("padded", 20, rejected=False)(batch).packs]
    assert sizes == [4, 4]


def test_the_mean_over_a_pairs_tokens_is_in_fp32_or_wider_and_has_no_rewards():
    policy = PairLogps(torch.tensor([-6.0, -1.0], dtype=torch.bfloat16), torch.zeros(2))
    out = SFT(policy, None, torch.tensor([3, 4, 0, 0]))
    assert out.losses.tolist() == [2.0, 0.25]
    assert out.losses.dtype == torch.float32
    assert out.margins.numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_run_learns_the_chosen_answers_without_any_reference(tmp_path, monkeypatch, layout):
    def no_reference(*_):
        raise AssertionError("a reference was built")

    monkeypatch.setattr(comparison, "build_reference", no_reference)
    settings = {"objective": "sft", "layout": layout, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    run = trainer(tmp_path, pairs(16), pairs(5, seed=3), **settings)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert set(logs[0]) == {
        "loss",
        "logps/chosen",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "pairs_seen",
        "peak_gib",
    }
    assert logs[-1]["loss"] < logs[0]["loss"]
    evaluated = next(entry for entry in run.state.log_history if "eval_loss" in entry)
    assert {key for key in evaluated if key.startswith("eval_")} - {"eval_runtime", "eval_samples_per_second"} == {
        "eval_loss", "eval_logps/chosen",
    }  # fmt: skip
    assert evaluation_files(tmp_path) == {}


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path):
    settings = {"objective": "sft", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, pairs(16), **settings)
    whole.train()
    resumed = trainer(tmp_path, pairs(16), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, whole.trained[name]) for name, p in resumed.trained.items())
