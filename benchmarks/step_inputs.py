"""What both implementations are given in `bench_step.py`: the same pairs, tokenizer, base and adapter, in one folder.

rows.jsonl            preference rows, in the order in which they are trained on
model/                a small Llama with random weights, and a tokenizer trained on the data's own text
adapter.safetensors   LoRA on all linear layers, away from its zero start, by parameter name
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from lorafocal.data.sources import Preference, read_preferences
from lorafocal.data.tokens import TokenizedPair, tokenize_preferences
from lorafocal.model.adapters import adapter_parameters, attach_lora
from lorafocal.sampler import shuffled

SEED = 0
VOCABULARY = 4096
SIZES = {  # 2.9 million parameters in the layers, 1 million in the head
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,  # of 64 channels, as in models of a billion parameters
    "num_key_value_heads": 2,
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

# Words of prompt, better and worse answer of the synthetic pairs: median, and sigma of the logarithm. Fitted by eye to
# answers of strong and weak models to everyday instructions: the better ones are several times longer.
SYNTHETIC_WORDS = {"prompt": (20, 0.9), "chosen": (330, 0.6), "rejected": (90, 1.0)}


def lora_config() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def prepare(folder: Path, data: Path | None, *, pairs: int, max_length: int) -> dict[str, float]:
    """Write the inputs; returns figures of the chosen pairs' lengths in tokens."""
    preferences = read_preferences(data).pairs if data else synthetic_preferences(2 * pairs)
    tokenizer = trained_tokenizer(preferences)
    kept = tokenize_preferences(preferences, tokenizer, max_length=max_length).pairs
    if len(kept) < pairs:
        raise SystemExit(f"only {len(kept)} pairs fit {max_length} tokens, and {pairs} are needed")
    chosen = [kept[i] for i in shuffled(len(kept), SEED, 0)[:pairs]]
    by_id = {preference.id: preference for preference in preferences}
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for pair in chosen:
            row = asdict(by_id[pair.id])
            file.write(json.dumps({name: row[name] for name in ("id", "prompt", "chosen", "rejected")}) + "\n")
    tokenizer.save_pretrained(folder / "model")
    write_model(folder, tokenizer)
    return lengths(chosen)


def lengths(pairs: list[TokenizedPair]) -> dict[str, float]:
    """Mean tokens of prompt, answers and longest sequence."""
    columns = {
        "prompt": [len(pair.prompt_ids) for pair in pairs],
        "chosen": [len(pair.chosen_ids) for pair in pairs],
        "rejected": [len(pair.rejected_ids) for pair in pairs],
        "longest": [pair.longest for pair in pairs],
    }
    return {name: round(sum(column) / len(column), 1) for name, column in columns.items()}


def synthetic_preferences(count: int) -> list[Preference]:
    """Made-up conversations: log-normal lengths, words drawn by Zipf's law."""
    draw = random.Random(SEED)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def turn(role: str, part: str) -> list[dict[str, str]]:
        median, sigma = SYNTHETIC_WORDS[part]
        length = max(1, round(median * draw.lognormvariate(0, sigma)))
        return [{"role": role, "content": " ".join(draw.choices(words, weights, k=length))}]

    return [
        Preference(turn("user", "prompt"), turn("assistant", "chosen"), turn("assistant", "rejected"), str(number))
        for number in range(count)
    ]


def trained_tokenizer(preferences: list[Preference]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the preferences' own text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(preferences), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:], chat_template=TEMPLATE,
    )  # fmt: skip


def texts(preferences: list[Preference]) -> Iterator[str]:
    for preference in preferences:
        for part in (preference.prompt, preference.chosen, preference.rejected):
            yield part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The base and an adapter whose effect is not zero, so that equal losses mean something."""
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "model")
    policy = attach_lora(base, lora_config())
    adapter = {name: parameter.detach() for name, parameter in adapter_parameters(policy).items()}
    for name, tensor in adapter.items():
        if "lora_B" in name:
            tensor.normal_(std=0.02)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter.safetensors")


def read_rows(folder: Path) -> list[dict]:
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@torch.no_grad()
def load_adapter(policy: PeftModel, folder: Path) -> None:
    """Give the policy's adapter the prepared weights, every tensor of it."""
    saved = load_file(folder / "adapter.safetensors")
    own = adapter_parameters(policy)
    if own.keys() != saved.keys():
        raise SystemExit("the adapter's parameter names differ from the prepared ones")
    for name, parameter in own.items():
        parameter.copy_(saved[name])
