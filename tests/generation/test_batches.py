"""Answers in batches against one at a time, against the model's probabilities, and what is left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from lorafocal.data.toy import toy_prompts, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.generation.asks import Completion
from lorafocal.generation.batches import complete_batch, completion, drawn, plan_batches, uniform
from lorafocal.generation.presets import Sampling
from lorafocal.generation.speech import Speech

pytestmark = pytest.mark.slow

EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """In float64, so that rounding decides nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    speech = Speech.of(tokenizer, templated=True)
    rows = [speech.conversation_ids(prompt) for prompt in toy_prompts(12, seed=1)]
    assert len({*map(len, rows)}) > 2
    return rows


def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[list[int]], sampling: Sampling, size: int
) -> list[Completion]:
    """In batches of `size` rows, in the order of the rows."""
    return [
        answer
        for start in range(0, len(rows), size)
        for answer in complete_batch(
            model,
            tokenizer,
            rows[start : start + size],
            [(place,) for place in range(start, min(start + size, len(rows)))],
            sampling,
            frozenset({tokenizer.eos_token_id}),
        )
    ]


@pytest.mark.row("27")
def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """The oracle is an argmax loop without cache, batch or padding."""
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 9 and tokenizer.eos_token_id not in ids[len(prompt) :]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        expected.append(Completion(text, len(new), new[-1] == tokenizer.eos_token_id))
    assert {answer.ended for answer in expected} == {True, False}
    for size in (1, 5, 12):
        assert answers(model, tokenizer, prompts, Sampling(max_new_tokens=9), size) == expected


@pytest.mark.row("57")
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.7}, {"top_k": 3}])
def test_a_drawn_answer_depends_on_seed_and_place_and_on_no_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], sampling: dict[str, Any]
) -> None:
    how = Sampling(max_new_tokens=8, temperature=1.2, seed=5, **sampling)
    alone = answers(model, tokenizer, prompts, how, 1)
    assert answers(model, tokenizer, prompts, how, 5) == alone
    assert answers(model, tokenizer, prompts, how, 12) == alone
    backwards = complete_batch(
        model, tokenizer, prompts[::-1], [(place,) for place in range(12)][::-1], how, frozenset({EOS})
    )
    assert backwards[::-1] == complete_batch(
        model, tokenizer, prompts, [(place,) for place in range(12)], how, frozenset({EOS})
    )
    other = Sampling(max_new_tokens=8, temperature=1.2, seed=6, **sampling)
    assert answers(model, tokenizer, prompts, other, 5) != alone
    same_prompt = answers(model, tokenizer, [prompts[0]] * 8, how, 8)
    assert len({answer.text for answer in same_prompt}) > 1


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
    ],
)
def test_drawn_tokens_have_the_models_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], how: dict[str, Any]
) -> None:
    """Draws of one token against the softmax, cut by transformers' own top-k and top-p: 5 sigma."""
    draws = 3000
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[:, -1] / how["temperature"]
    if "top_k" in how:
        logits = TopKLogitsWarper(how["top_k"])(None, logits)
    if "top_p" in how:
        logits = TopPLogitsWarper(how["top_p"])(None, logits)
    found = answers(model, tokenizer, [prompts[0]] * draws, Sampling(max_new_tokens=1, **how), 1000)
    texts = [answer.text for answer in found]
    for token, probability in enumerate(logits.softmax(-1)[0].tolist()):
        if token not in tokenizer.all_special_ids:
            share = texts.count(tokenizer.decode([token])) / draws
            assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / draws) + 1e-9


def test_an_answer_is_what_was_drawn_whatever_the_tokenizer_would_tidy() -> None:
    words = ["it", "'s", ".", "is", "n't", "<end>"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="it"))
    tidy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=True)
    assert tidy.decode([0, 1, 2]) == "it's."
    assert completion([0, 1, 2, 3, 4, 5, 0], tidy, frozenset({5})) == Completion("it 's . is n't", 6, True)


def test_the_drawn_token_is_the_first_above_the_number() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    logits = probabilities.double().log()
    for number, token in ((0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)):
        assert drawn(logits, torch.tensor([number], dtype=torch.float64)).item() == token
    how = Sampling(max_new_tokens=1000, temperature=1.0, seed=3)
    numbers = uniform(how, (0, 1))
    assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.05
    assert not (uniform(how, (1, 0)) == numbers).any()


@pytest.mark.row("58")
def test_only_the_sampling_decides_and_everything_is_left_as_it_was(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    """Models bring a generation config that asks for penalties and other lengths; transformers fills gaps from it."""
    sampling = Sampling(max_new_tokens=8)
    expected = answers(model, tokenizer, prompts, sampling, 12)
    own = model.generation_config
    changed = {"repetition_penalty": 3.0, "min_new_tokens": 8, "max_length": 3, "temperature": 0.1, "top_k": 1}
    before = {name: getattr(own, name, None) for name in changed}
    mixed = [module.train(number % 2 == 0) for number, module in enumerate(model.modules())]
    modes = [module.training for module in mixed]
    torch.manual_seed(7)
    random = torch.get_rng_state()
    try:
        for name, value in changed.items():
            setattr(own, name, value)
        assert answers(model, tokenizer, prompts, sampling, 12) == expected
        drawn_once = Sampling(max_new_tokens=8, temperature=1.0)
        first = answers(model, tokenizer, prompts, drawn_once, 12)
        assert any(answer.tokens is not None and answer.tokens < 8 for answer in first)  # min_new_tokens forbids it
        assert model.generation_config is own
        assert own.repetition_penalty == 3.0
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
    finally:
        for name, was in before.items():
            setattr(own, name, was)
        model.eval()


def test_logits_that_are_no_numbers_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        for temperature in (0.0, 1.0):
            with pytest.raises(InputError, match="no finite numbers"):
                answers(model, tokenizer, prompts, Sampling(max_new_tokens=2, temperature=temperature), 4)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 300))
def test_batches_hold_each_row_once_within_the_budget(lengths: list[int], new: int, budget: int) -> None:
    batches = plan_batches(lengths, new, budget)
    places = [place for batch in batches for place in batch]
    assert sorted(places) == list(range(len(lengths)))
    ordered = [lengths[place] for place in places]
    assert ordered == sorted(ordered, reverse=True)
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        width = max(lengths[place] for place in batch) + new
        assert len(batch) == 1 or len(batch) * width <= budget
        assert not after or (len(batch) + 1) * width > budget
