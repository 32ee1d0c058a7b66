"""Sampling against the model's probabilities, padding that changes nothing, intervals' closed forms."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafocal.data.toy import is_right, right_answer, toy_prompts, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate.generate import judge, paired_interval, prompt_ids, sample_answers, share


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The oracle is an argmax loop without cache, batch or padding."""
    prompts = toy_prompts(12, seed=1)
    expected = []
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer)
        start = len(ids)
        while len(ids) < start + 5 and tokenizer.eos_token_id not in ids[start:]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert len({len(prompt_ids(prompt, tokenizer)) for prompt in prompts}) > 1
    for batch_size in (1, 5, 12):
        greedy = sample_answers(model, tokenizer, prompts, max_new_tokens=5, temperature=0, batch_size=batch_size)
        assert greedy == expected


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_tokens_have_the_models_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    """No top-k, no top-p and the temperature itself: draws of one token against the softmax, 5 sigma."""
    prompt, draws = "sort 3 1 4", 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids(prompt, tokenizer)])).logits[0, -1]
    probabilities = (logits / temperature).softmax(-1)
    answers = sample_answers(
        model, tokenizer, [prompt] * draws, max_new_tokens=1, temperature=temperature, batch_size=1000
    )
    for token, probability in enumerate(probabilities.tolist()):
        if token not in tokenizer.all_special_ids:
            found = answers.count(tokenizer.decode([token])) / draws
            assert abs(found - probability) < 5 * math.sqrt(probability * (1 - probability) / draws) + 1e-3


def test_a_seed_fixes_the_answers_and_nothing_outside_changes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = toy_prompts(20, seed=1)
    model.train()
    torch.manual_seed(7)
    first = sample_answers(model, tokenizer, prompts, max_new_tokens=4, seed=1)
    after = torch.rand(1)
    assert model.training
    assert tokenizer.padding_side == toy_tokenizer().padding_side
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    assert sample_answers(model, tokenizer, prompts, max_new_tokens=4, seed=1) == first
    assert sample_answers(model, tokenizer, prompts, max_new_tokens=4, seed=2) != first


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": math.nan}, {"batch_size": 0}])
def test_wrong_settings_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, wrong: dict[str, float]
) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        sample_answers(model, tokenizer, ["sort 1 2 3"], max_new_tokens=4, **wrong)  # type: ignore[arg-type]


def test_the_rule_decides_the_share() -> None:
    prompts = toy_prompts(4, seed=0)
    answers = [right_answer(prompt[-1]["content"]) for prompt in prompts[:3]] + ["9 9"]
    assert judge(prompts, answers, is_right) == [True, True, True, False]
    assert share(judge(prompts, answers, is_right)).value == 0.75


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (335, 500), (10, 10)])
def test_wilsons_bounds_are_the_roots_of_the_score_equation(right: int, total: int) -> None:
    """A bound p solves (value - p)^2 = z^2 p (1 - p) / n: the definition, not its solution."""
    found = share([True] * right + [False] * (total - right))
    for bound in (found.low, found.high):
        left = (found.value - bound) ** 2
        assert left == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / total, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_a_share_reads_well() -> None:
    assert str(share([True] * 81 + [False] * 182)) == "30.8% [25.5, 36.6]"
    with pytest.raises(InputError, match="at least one"):
        share([])


def test_the_paired_interval_has_its_closed_form() -> None:
    """Bonett and Price (2012): with one gain and one loss added, an ordinary interval for a mean of -1, 0 and 1."""
    before = [False] * 40 + [True] * 60
    after = [False] * 20 + [True] * 20 + [False] * 5 + [True] * 55
    changes = torch.tensor([a - b for b, a in zip(before, after, strict=True)] + [1, -1], dtype=torch.float64)
    difference, low, high = paired_interval(before, after)
    spread = 1.959963984540054 * changes.std(correction=0) / math.sqrt(len(changes))
    assert difference == 0.15
    assert low == pytest.approx(float(changes.mean() - spread), abs=1e-12)
    assert high == pytest.approx(float(changes.mean() + spread), abs=1e-12)


def test_the_paired_interval_covers_the_truth_about_95_times_in_a_hundred() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        before = [rng.random() < 0.5 for _ in range(200)]
        after = [was if rng.random() < 0.6 else rng.random() < 0.7 for was in before]  # 0.4 x (0.7 - 0.5) = 0.08
        _, low, high = paired_interval(before, after)
        covered += low <= 0.08 <= high
    assert 930 <= covered <= 970


def test_the_paired_interval_is_symmetric_and_never_empty() -> None:
    before, after = [True, False, True, True], [False, False, True, False]
    difference, low, high = paired_interval(before, after)
    assert paired_interval(after, before) == pytest.approx((-difference, -high, -low))
    same, low, high = paired_interval(before, before)
    assert same == 0
    assert low < 0 < high
    with pytest.raises(InputError, match="same prompts twice"):
        paired_interval([True], [])
