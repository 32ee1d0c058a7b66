"""Sampled answers, the share a rule calls right, and intervals for a share and for its change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafocal.errors import InputError

Prompt = str | list[dict[str, str]]
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `total` with its 95% interval; reads well in an f-string: `67.2% [63.0, 71.2]`."""

    value: float
    low: float
    high: float
    total: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """One answer for each prompt, in order, without special tokens.

    `temperature` 0 is greedy; above 0, tokens are drawn from the model's whole distribution (no top-k, no
    top-p). The same seed and batch size give the same answers on one machine; the caller's random state, the
    model's mode and the tokenizer are left as they were. Prompts are padded on the left and masked, so
    padding changes no answer.
    """
    if temperature < 0 or not math.isfinite(temperature):
        raise InputError(f"temperature is 0 (greedy) or a positive number, not {temperature}")
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size are 1 or more, not {max_new_tokens} and {batch_size}")
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": padding_id(tokenizer),
        **drawing,
    }
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    answers: list[str] = []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                rows = [prompt_ids(prompt, tokenizer) for prompt in prompts[start : start + batch_size]]
                input_ids, attention_mask = pad_left(rows, padding_id(tokenizer))
                output = model.generate(
                    input_ids=input_ids.to(model.device),
                    attention_mask=attention_mask.to(model.device),
                    **options,
                )
                completions = output[:, input_ids.shape[1] :].tolist()
                answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens as in training: the chat template with its generation prompt, or plain text."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id serves, since padding is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)`, both (rows, longest) int64, every row ending at the right edge."""
    longest = max(map(len, rows))
    input_ids = [[pad_id] * (longest - len(row)) + row for row in rows]
    attention_mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def judge(prompts: Sequence[Prompt], answers: Sequence[str], rule: Callable[[Prompt, str], bool]) -> list[bool]:
    """The rule's verdict on each answer, in order."""
    return [rule(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def share(verdicts: Sequence[bool]) -> Share:
    """A share with Wilson's 95% score interval (1927), which also holds near 0 and 1."""
    total = len(verdicts)
    if not total:
        raise InputError("a share of nothing has no value: give at least one verdict")
    value = sum(verdicts) / total
    centre = (value + Z_95**2 / (2 * total)) / (1 + Z_95**2 / total)
    spread = Z_95 / (1 + Z_95**2 / total) * math.sqrt(value * (1 - value) / total + Z_95**2 / (4 * total**2))
    low = max(0.0, centre - spread) if value > 0 else 0.0  # exactly, where rounding would leave 1e-17
    high = min(1.0, centre + spread) if value < 1 else 1.0
    return Share(value, low, high, total)


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """`(difference, low, high)` of the share `after` minus the share `before` on the same prompts, 95%.

    Bonett and Price's adjusted Wald interval for paired shares (2012): one prompt is added to each kind of
    change, after which the difference of changed prompts is normal enough even for few of them. Pairing by
    prompt removes the spread between easy and hard prompts, which two separate intervals would count twice.
    """
    if len(before) != len(after) or not before:
        raise InputError(f"a paired comparison needs the same prompts twice, not {len(before)} and {len(after)}")
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    total = len(before)
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    spread = Z_95 * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return (gained - lost) / total, max(-1.0, up - down - spread), min(1.0, up - down + spread)
