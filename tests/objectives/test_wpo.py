"""WPO: closed forms of its weights, the policy's collisions in every layout, and TRL's `use_weighting`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config
from trl import DPOConfig, DPOTrainer

from lorafocal import FocalPOConfig, FocalPOTrainer
from lorafocal.data.packing import PairCollator, pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.policy import of_pairs, plain_attention, prepare_policy, sequence_logps, sums_of, token_logps
from lorafocal.reference import DisabledAdapterReference
from tests.test_parity_trl import rows, word_tokenizer
from tests.tiny import SIZES, disturb, enlarged, lora, pairs, relative_difference, tiny_base, tiny_policy, trainer

WPO, DPO = build_objective("wpo", beta=0.3), build_objective("dpo", beta=0.3)


def made_up(count: int = 5, vocabulary: int = 11) -> tuple[PairLogps, PairLogps, Tensor, Tensor, list[float]]:
    """Log-probs of pairs of answers of 1 to 5 tokens from whole distributions, and their weights token by token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (2 * count,), generator=generator)
    sums, collisions, weights = [], [], []
    for length in lengths.tolist():
        pi = torch.randn(length, vocabulary, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
        picked = pi.gather(-1, torch.randint(vocabulary, (length, 1), generator=generator)).squeeze(-1)
        sums.append(picked.log().sum())
        collisions.append(pi.square().sum(-1).log().sum())
        weights.append(float((picked / pi.square().sum(-1)).prod()) ** (1 / length))
    policy = PairLogps(*torch.stack(sums).split(count))
    reference = PairLogps(*(side + torch.randn(count, generator=generator) for side in policy))
    wanted = [chosen * rejected for chosen, rejected in zip(weights[:count], weights[count:], strict=True)]
    return policy, reference, lengths, torch.stack(collisions), wanted


@pytest.mark.row("64")
def test_the_loss_is_dpos_times_the_geometric_means_of_both_answers() -> None:
    policy, reference, lengths, collisions, weights = made_up()
    found = WPO(policy, reference, lengths, collisions=collisions)
    [constant] = found.constants
    assert constant.tolist() == pytest.approx(weights, rel=1e-12)
    assert found.losses.tolist() == pytest.approx((constant * DPO(policy, reference).losses).tolist(), rel=1e-12)
    shares = WPO.weights(found.log_odds, *found.constants) / DPO.weights(found.log_odds)
    assert shares.tolist() == pytest.approx(weights, rel=1e-12)


def test_no_gradient_goes_through_the_weights() -> None:
    policy, reference, lengths, collisions, weights = made_up()
    gradients = []
    for objective in (WPO, DPO):
        leaves = PairLogps(*(side.clone().requires_grad_() for side in policy))
        objective(leaves, reference, lengths, collisions=collisions).losses.sum().backward()
        gradients.append(torch.stack([side.grad for side in leaves]))
    torch.testing.assert_close(
        gradients[0], gradients[1] * torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


def test_losses_have_the_width_of_the_log_probs_though_collisions_are_float64() -> None:
    policy, reference, lengths, collisions, weights = made_up()
    narrow = [PairLogps(*(side.float() for side in logps)) for logps in (policy, reference)]
    found = WPO(*narrow, lengths, collisions=collisions)
    assert found.losses.dtype == DPO(*narrow).losses.dtype == torch.float32  # ranks gather them: one width
    assert found.constants[0].tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("certain", [True, False])
def test_a_policy_that_is_certain_or_knows_nothing_weighs_its_own_answers_as_dpo(certain: bool) -> None:
    of_token = 0.0 if certain else -math.log(50)
    lengths = torch.tensor([3, 7, 2, 4])
    logps = PairLogps(*(of_token * lengths.double()).split(2))
    reference = PairLogps(logps.chosen - 0.3, logps.rejected + 0.2)
    found = WPO(logps, reference, lengths, collisions=of_token * lengths.double())
    assert found.losses.tolist() == pytest.approx(DPO(logps, reference).losses.tolist(), rel=1e-12)


def test_it_takes_no_focal_factor() -> None:
    with pytest.raises(InputError, match="wpo has weights or targets of its own"):
        build_objective("wpo", beta=0.1, focal={"form": "p_gamma", "gamma": 0.05})


# ---- collisions of a model --------------------------------------------------------------------------------------


@torch.no_grad()
def one_at_a_time(model: nn.Module, batch: list[TokenizedPair]) -> Tensor:
    """Log sum_v pi_v^2 summed over each answer, from the model's own logits."""
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in batch] + [(p.prompt_ids, p.rejected_ids) for p in batch]
    found = []
    with plain_attention(model):
        for prompt, answer in answers:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            found.append(logits.softmax(-1).square().sum(-1).log().sum())
    return torch.stack(found)


def soft_capped() -> nn.Module:
    """A Gemma 2 whose logits are capped where that shows."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES | {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0})
    return enlarged(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).requires_grad_(False)


@pytest.mark.parametrize(("make", "layouts"), [(tiny_policy, ("packed", "padded")), (soft_capped, ("padded",))])
def test_collisions_are_those_of_the_models_own_logits_in_every_layout(make: Any, layouts: tuple[str, ...]) -> None:
    batch = pairs(6)
    for layout in layouts:
        model = make().eval()
        prepare_policy(model, layout=layout)
        pack = share_prefixes(batch) if layout == "packed" else pad_sequences(batch)
        of_tokens = torch.empty(len(pack.index.labels), dtype=torch.float64)
        logps = of_pairs(sums_of(token_logps(model, pack, of_tokens), pack), pack)
        collisions = sums_of(of_tokens, pack)
        assert not collisions.requires_grad
        torch.testing.assert_close(collisions, one_at_a_time(model, batch), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(logps, sequence_logps(model, pack), strict=True):
            assert torch.equal(ours, theirs)


def test_steps_are_the_definition_of_all_their_pairs_whatever_the_packs(tmp_path: Path) -> None:
    batch, runs = pairs(8), []
    for number, (layout, budget) in enumerate((("packed", 10_000), ("packed", 40), ("padded", 60))):
        settings: dict[str, Any] = {"objective": "wpo", "beta": 0.3, "max_steps": 2, "learning_rate": 3e-2}
        settings |= {"layout": layout, "tokens_per_pack": budget, "identity_probe": False, "eval_steps": 2}
        run = trainer(tmp_path / str(number), batch, pairs(5, seed=3), eval_strategy="steps", **settings)
        disturb(run.model)
        if number == 0:
            wanted = whole_batch(run.model, batch)
        run.train()
        runs.append(run)
    losses, evaluated = (
        [[line[key] for line in run.state.log_history if key in line] for run in runs] for key in ("loss", "eval_loss")
    )
    assert losses[0][0] == pytest.approx(wanted, rel=1e-5)
    for number in (1, 2):
        assert losses[number] == pytest.approx(losses[0], rel=1e-5)
        assert evaluated[number] == pytest.approx(evaluated[0], rel=1e-5)
        assert relative_difference(*({n: p.detach() for n, p in runs[k].trained.items()} for k in (number, 0))) < 1e-4


@torch.no_grad()
def whole_batch(model: nn.Module, batch: list[TokenizedPair]) -> float:
    """The mean loss of pairs in one pack, their collisions one sequence at a time."""
    [pack] = PairCollator("packed", 10_000)(batch).packs
    policy, reference = sequence_logps(model, pack), DisabledAdapterReference(model).logps(pack)
    collisions = one_at_a_time(model, batch)
    return float(WPO(policy, reference, pack.index.lengths, collisions=collisions).losses.mean())


# ---- TRL ---------------------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.slow
def test_the_losses_of_two_steps_are_those_of_trl(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "beta": 0.3, "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    data = rows()[:8]
    ours = FocalPOTrainer(
        tiny_base(),
        args=FocalPOConfig(str(tmp_path / "ours"), objective="wpo", pairs_per_step=8, identity_probe=False, **settings),
        train_dataset=data,
        processing_class=word_tokenizer(),
        peft_config=lora(),
    )
    once = {"use_weighting": True, "per_device_train_batch_size": 8, "gradient_checkpointing": False, "bf16": False}
    theirs = DPOTrainer(
        tiny_base(),
        args=DPOConfig(str(tmp_path / "theirs"), **once, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=word_tokenizer(),
        peft_config=lora(),
    )
    losses, weights = [], []
    for run in (ours, theirs):
        disturb(run.model)
        run.train()
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
        weights.append({name: p.detach() for name, p in run.model.named_parameters() if "lora_" in name})
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative_difference(*weights) < 1e-4
