"""Answers of a loaded model, in batches: an answer does not depend on what else is in its batch.

Rows are padded on the left and masked. A sampled token is the one at which the cumulative probabilities pass a uniform
number, and the numbers of a row are a function of the seed and the row's key alone: another batch, another order or a
second start gives the same draws, up to the rounding of the model's arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorafocal.errors import InputError
from lorafocal.generation.asks import Completion, Key
from lorafocal.generation.presets import BATCH_TOKENS, Sampling
from lorafocal.model.head import causal_lm


def plan_batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Rows by place, in batches: the longest first, rows x (longest prompt + new tokens) at most `batch_tokens`.

    A function of its arguments alone. A row that exceeds the budget by itself makes a batch by itself.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        batch = batches[-1] if batches else []
        if batch and (len(batch) + 1) * (lengths[batch[0]] + max_new_tokens) <= batch_tokens:
            batch.append(place)
        else:
            batches.append([place])
    return batches


def complete_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Key],
    sampling: Sampling,
    ends: frozenset[int],
) -> list[Completion]:
    """One answer to each of `prompts` (token ids), in order; `keys` are the rows' own.

    Tokens come from the sampling alone: whatever the model's generation config asks for beyond, such as a repetition
    penalty, is left out. An answer ends with one of the ids in `ends`. The model's modes, its generation config and
    everybody's random state are left as they were. Raises InputError where the logits are no numbers.
    """
    inner = causal_lm(model)
    pad = _padding_id(tokenizer)
    input_ids, attention_mask = pad_left(prompts, pad)
    width = input_ids.shape[1]
    config = GenerationConfig(
        do_sample=False,  # the processor below leaves one token to choose from
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    draw = Draw(sampling, keys, width)
    with torch.no_grad(), _as_generator(inner, config):
        output = inner.generate(
            input_ids=input_ids.to(inner.device),
            attention_mask=attention_mask.to(inner.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    return [completion(row, tokenizer, ends) for row in output[:, width:].tolist()]


def completion(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> Completion:
    """The answer in drawn ids, of which those after the first end are padding; no blank in it is tidied away."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Completion(text, len(ids) if end is None else end + 1, end is not None)


class Draw(LogitsProcessor):
    """Leaves each row the one token that is drawn: the likeliest, or the one that its own uniform number falls on."""

    def __init__(self, sampling: Sampling, keys: Sequence[Key], width: int) -> None:
        self._sampling, self._width = sampling, width
        self._warpers: list[LogitsProcessor] = []
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._uniform = (
            torch.empty(len(keys), 0)
            if sampling.greedy
            else torch.from_numpy(np.stack([uniform(sampling, key) for key in keys]))
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) ids and (rows, vocabulary) logits -> zero for the drawn token, minus infinity elsewhere."""
        if self._sampling.greedy:
            token = scores.argmax(-1, keepdim=True)
        else:
            scores = scores / self._sampling.temperature
            for warper in self._warpers:
                scores = warper(input_ids, scores)
            step = input_ids.shape[1] - self._width
            token = drawn(scores, self._uniform[:, step].to(scores.device))
        if not bool(scores.gather(1, token).isfinite().all()):
            raise InputError("the model's logits are no finite numbers: it overflows in the dtype that it computes in")
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """(rows, 1) the first token whose cumulative probability is above the row's number in [0, 1).

    The sums are float64, over which a vocabulary's rounding does not show; the last is 1 exactly.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)
    return token.clamp(max=logits.shape[-1] - 1)  # out of range where the logits are no numbers


def uniform(sampling: Sampling, key: Key) -> np.ndarray:
    """(max_new_tokens,) float64 in [0, 1): a row's numbers, from the seed and its key alone."""
    return np.random.default_rng([sampling.seed, *key]).random(sampling.max_new_tokens)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both (rows, longest) int64, every row ending at the right edge."""
    longest = max(map(len, rows))
    input_ids = [[pad_id] * (longest - len(row)) + [*row] for row in rows]
    attention_mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id serves, since padding is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


@contextmanager
def _as_generator(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """In eval mode, every module by itself, and with no generation config but ours: transformers fills gaps from it."""
    modes = {module: module.training for module in model.modules()}
    own = model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        for module, mode in modes.items():
            module.training = mode
