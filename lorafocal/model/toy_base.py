"""The quickstart's base: a tiny Llama trained from scratch on the toy task, so that nothing is downloaded.

Nearly half of the answers it learns from are wrong, so that it knows the task and still errs: room for
preferences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafocal.data import toy
from lorafocal.data.cache import default_folder
from lorafocal.publish import published


@dataclass(frozen=True, slots=True)
class ToyRecipe:
    """Sizes and training of the base. The defaults are what the quickstart uses: 312 thousand parameters."""

    hidden_size: int = 96
    intermediate_size: int = 232
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    steps: int = 800
    examples_per_step: int = 128
    learning_rate: float = 3e-3  # peak; warm-up over the first tenth, then linear to 0
    wrong_share: float = 0.45
    seed: int = 0


def toy_base(
    cache_dir: Path | None = None,
    *,
    recipe: ToyRecipe | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """The folder of the toy base (weights and tokenizer), trained now if the cache does not hold it.

    `cache_dir` is the cache of tokenised data (`data.cache.default_folder`) where not given. The folder's name is a
    checksum of everything that changes the weights, so a changed task, recipe or library trains anew.
    `on_step(step, loss)` is called after each training step (not when the base is found): for a progress
    line.
    """
    recipe = recipe or ToyRecipe()
    cache = cache_dir or default_folder()
    folder = cache / f"toy-base-{content_key(recipe)}"
    if folder.is_dir():
        return folder
    tokenizer = toy.toy_tokenizer()
    model = train(recipe, tokenizer, on_step)
    with published(folder, replace=True, record=False) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def content_key(recipe: ToyRecipe) -> str:
    """Twelve hex digits over the recipe, the library versions, and the source of the task and of this file.

    Hashing the sources costs a needless training after a changed comment, and can never forget a changed
    rule.
    """
    sources = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (toy.__file__, __file__)]
    content = [asdict(recipe), torch.__version__, transformers.__version__, *sources]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def train(
    recipe: ToyRecipe, tokenizer: PreTrainedTokenizerFast, on_step: Callable[[int, float], None] | None
) -> LlamaForCausalLM:
    """A plain next-token loop over the answers; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = LlamaForCausalLM(toy_config(recipe, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup + 1))
    )
    for step, (input_ids, labels) in enumerate(batches(recipe, tokenizer), start=1):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step:
            on_step(step, loss.item())
    return model.eval()


def toy_config(recipe: ToyRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama with the recipe's sizes and the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(recipe: ToyRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """`(input_ids, labels)` of each step, (examples, T): right-padded, labels -100 but for the answers."""
    examples = toy.noisy_answers(
        recipe.steps * recipe.examples_per_step, wrong_share=recipe.wrong_share, seed=recipe.seed
    )
    for _ in range(recipe.steps):
        asked, answered = zip(*[next(examples) for _ in range(recipe.examples_per_step)], strict=True)
        prompts = tokenizer([f"{toy.USER}{question}{toy.END}{toy.ASSISTANT}" for question in asked])["input_ids"]
        answers = tokenizer([f"{answer}{toy.END}" for answer in answered])["input_ids"]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
        labels = torch.full((len(prompts), length), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield input_ids, labels
