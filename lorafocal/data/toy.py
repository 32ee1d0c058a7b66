"""The quickstart's task: sort, reverse or find the maximum of three to five digits.

A rule decides which answer is right, so no judge is needed to see whether preference tuning made a model
better. Everything is a pure function of its seed. Held-out questions are told from training ones by a
checksum of their text, so the two never meet, whatever the seeds and counts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafocal.errors import InputError

Messages = list[dict[str, str]]

OPERATIONS = ("sort", "reverse", "maximum")
DIGITS = "0123456789"
LENGTHS = (3, 4, 5)
HELD_OUT_SHARE = 10  # one question in ten
MOST_QUESTIONS = 20_000  # distinct held-out questions are about 33 000; far fewer keep the draw short

USER, ASSISTANT, END, UNKNOWN = "<|user|>", "<|assistant|>", "<|end|>", "<|unknown|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out tenth: a property of its text alone."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def draw_questions(seed: int, *, held_out: bool = False) -> Iterator[str]:
    """Endless questions such as `"sort 3 1 4"`, repetitions included, from one side of the split."""
    rng = random.Random(f"questions {seed}")
    while True:
        digits = rng.choices(DIGITS, k=rng.choice(LENGTHS))
        question = " ".join([rng.choice(OPERATIONS), *digits])
        if is_held_out(question) == held_out:
            yield question


def right_answer(question: str) -> str:
    """The one right answer, digits separated by spaces: `"sort 3 1 4"` gives `"1 3 4"`."""
    operation, *digits = question.split() or [""]
    if operation not in OPERATIONS or not digits or not set(digits) <= set(DIGITS):
        raise InputError(f"{question!r} is no question of the toy task; one looks like 'sort 3 1 4'")
    if operation == "sort":
        return " ".join(sorted(digits))
    if operation == "reverse":
        return " ".join(reversed(digits))
    return max(digits)


def wrong_answer(question: str, rng: random.Random) -> str:
    """A slip: two neighbouring digits of the right answer swapped, or a digit that is not the maximum."""
    right = right_answer(question).split()
    if len(right) == 1:
        slips = [[digit] for digit in sorted({*question.split()[1:]} - {*right})]
    else:
        swaps = [[*right[:i], right[i + 1], right[i], *right[i + 2 :]] for i in range(len(right) - 1)]
        slips = [swap for swap in swaps if swap != right]
    if not slips:  # all digits alike
        slips = [[*right[:-1], digit] for digit in DIGITS if digit != right[-1]]
    return " ".join(rng.choice(slips))


def is_right(prompt: str | Sequence[dict[str, str]], answer: str) -> bool:
    """The rule, for a question or a conversation that ends with one; spaces in the answer do not matter."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return "".join(answer.split()) == "".join(right_answer(question).split())


def toy_prompts(count: int, *, seed: int = 0, held_out: bool = False) -> list[Messages]:
    """`count` distinct prompts, each a conversation of one user message."""
    if not 0 < count <= MOST_QUESTIONS:
        raise InputError(f"the toy task gives 1 to {MOST_QUESTIONS} distinct prompts, not {count}")
    distinct: dict[str, None] = {}
    for question in draw_questions(seed, held_out=held_out):
        distinct[question] = None
        if len(distinct) == count:
            break
    return [[{"role": "user", "content": question}] for question in distinct]


def toy_preferences(count: int, *, seed: int = 0, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` rows in TRL's conversational form, prompts distinct: chosen is right, rejected is wrong."""
    rng = random.Random(f"answers {seed}")
    rows = []
    for prompt in toy_prompts(count, seed=seed, held_out=held_out):
        question = prompt[-1]["content"]
        chosen, rejected = right_answer(question), wrong_answer(question, rng)
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def noisy_answers(count: int, *, wrong_share: float, seed: int) -> Iterator[tuple[str, str]]:
    """`count` training questions, repetitions included, with answers of which a share is wrong."""
    rng = random.Random(f"noise {seed}")
    for question, _ in zip(draw_questions(seed), range(count), strict=False):
        wrong = rng.random() < wrong_share
        yield question, wrong_answer(question, rng) if wrong else right_answer(question)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or digit, no BOS, and a chat template whose turns end with the EOS `<|end|>`."""
    words = [UNKNOWN, END, USER, ASSISTANT, *OPERATIONS, *DIGITS]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
