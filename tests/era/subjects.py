"""What both sides of the outside oracle are given: tokenizers, rows, weights and settings, made without any hub.

Imported by the tests and, in the environment of `build.py`, by `produce.py`, so nothing here is newer than Python 3.10,
tokenizers 0.20 and transformers 4.45. Nothing is drawn by a library whose draws may change.
"""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

# ---- tokenizers

MERGES = [
    "t h",
    "th e",
    "i n",
    "a n",
    "e r",
    "o n",
    "r e",
    "an d",
    "in g",
    "y e",
    "ye s",
    "s t",
    "h e",
    "o u",
    "ou r",
    "b l",
    "a bl",
]
LLAMA_3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
LLAMA_3_LIKE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR_LIKE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
INST_LIKE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _vocabulary(special: list[str], alphabet: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [tuple(merge.split()) for merge in MERGES]
    merges += [(space, "the"), (space, "and"), (space, "y"), (space + "y", "es"), ("a", "."), (".", "\u010a")]
    merges = [(a, b) for a, b in merges if set(a + b) <= {*"".join(alphabet)}]
    texts = dict.fromkeys(
        [*special, *alphabet, *(a + b for a, b in merges), *(part for pair in merges for part in pair)]
    )
    return {text: place for place, text in enumerate(texts)}, merges  # type: ignore[return-value]


def _finished(backend: Tokenizer, special: list[str], template: str | None, named: dict[str, str]) -> Any:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], **named)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(special: list[str], template: str | None = None, split: str | None = None, **named: str) -> Any:
    """Byte-level BPE, as Llama-3's and GPT-2's; merges cross words unless `split` says where words end."""
    vocabulary, merges = _vocabulary(special, sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), whole] if split else [whole]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, special, template, named)


def with_fallback(special: list[str], template: str | None = None, **named: str) -> Any:
    """BPE on characters with `▁` for blanks and bytes for what is unknown, as Llama-2's and Mistral's."""
    letters = [chr(i) for i in range(33, 127)] + ["\u2581"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    vocabulary, merges = _vocabulary([*special, *fallback], letters, "\u2581")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=special[0]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(backend, special, template, named)


OF_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OF_MISTRAL = ["<unk>", "<s>", "</s>"]


def all_tokenizers() -> dict[str, Any]:
    """By name; the chat ones first. Both EOS tokens that Llama-3's tokenizer has had; BOS of GPT-2, and none."""
    bos, end_of_text, eot = OF_LLAMA_3[0], OF_LLAMA_3[1], OF_LLAMA_3[4]
    llama_3 = {"template": LLAMA_3_LIKE, "split": LLAMA_3_SPLIT, "bos_token": bos}
    mistral = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "llama-3": byte_level(OF_LLAMA_3, eos_token=eot, **llama_3),
        "llama-3 at first": byte_level(OF_LLAMA_3, eos_token=end_of_text, **llama_3),
        "zephyr": with_fallback(OF_MISTRAL, ZEPHYR_LIKE, **mistral),
        "mistral": with_fallback(OF_MISTRAL, INST_LIKE, **mistral),
        "plain mistral": with_fallback(OF_MISTRAL, **mistral),
        "plain gpt-2": byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        "plain without bos": byte_level(["<|endoftext|>"], eos_token="<|endoftext|>"),
    }


# ---- rows

Row = dict[str, Any]
# max_length and max_prompt_length: nothing is cut; prompts are; both are; answers are, though prompts are short
LIMITS = [(2000, 1000), (170, 60), (80, 40), (60, 50)]


def text(draw: random.Random, words: int) -> str:
    """English-looking words, so that merges happen."""
    known = "the and our string tea on here stone yes sin yeast ring and. naïve end. then rest, over".split()
    return " ".join(draw.choice(known) for _ in range(words))


def chats() -> list[Row]:
    """Conversations with short and long prompts and answers, several turns, a system message, edges of blanks."""
    draw = random.Random(1)
    lengths = [(2, 2, 3), (3, 12, 1), (60, 2, 4), (60, 40, 2), (1, 90, 5), (25, 25, 25), (40, 1, 70)]
    rows = [_chat(text(draw, p), text(draw, c), text(draw, r)) for p, c, r in lengths]
    rows.append(_chat("over and over", "  yes and blanks around ", "\nthe answer\n"))
    several = [("system", "be over here"), ("user", "yes?"), ("assistant", "the end."), ("user", text(draw, 9))]
    rows.append(_chat("", text(draw, 5), text(draw, 30), before=several[1:]))
    rows.append(_chat("", text(draw, 5), text(draw, 30), before=several))
    rows.append(_chat("", "yes", "no", before=[("system", ""), ("user", "the empty system turn of a handbook")]))
    return rows


def _chat(prompt: str, chosen: str, rejected: str, before: list[tuple[str, str]] | None = None) -> Row:
    said = before or [("user", prompt)]
    return {
        "prompt": [{"role": role, "content": content} for role, content in said],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def strings() -> list[Row]:
    """Plain text; the first ones with merges across the seam: on both sides, on one, of different lengths, of all."""
    seams = [
        ("Say th", "e end", "ere"),  # `th e` on both sides: one prompt, and one token less
        ("Say th", "e end", "ings"),  # on the chosen side alone
        ("Say th", "ings", "e end"),  # on the rejected side alone
        ("Say t", "he end", "here"),  # further merges: the joint text has fewer tokens
        ("t", "he", "h"),  # all of it is one token, nothing is left of a prompt
        ("o", "ur ring", "our"),
        ("Say y", "es", "e"),
        ("Say ab", "l", "b"),  # with its answer the prompt has fewer tokens than alone
        ("Say the end", ".", "."),
        ("Say the end.", "\nyes", "\nno"),
        ("Say ", "yes", "and"),
        ("Say", " yes", " and"),
        ("Say: naïve", " naïve", "té"),
    ]
    draw = random.Random(2)
    lengths = [(60, 2, 4), (60, 40, 2), (1, 90, 5), (25, 25, 25), (40, 1, 70)]
    texts = seams + [(text(draw, p) + "\n", text(draw, c), text(draw, r)) for p, c, r in lengths]
    return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]


def rows_for(tokenizer: Any) -> list[Row]:
    return chats() if tokenizer.chat_template else strings()


# ---- a training

STEPS, PAIRS_PER_STEP, BATCH, BETA, GAMMA = 10, 8, 4, 0.1, 0.5
TRAINING_LIMITS = (90, 40)
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,  # large enough to show which parameters have none
    "max_grad_norm": 0.5,  # below the gradient norms of this task, so that clipping takes part
    "optim": "adamw_torch",
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def training_rows() -> list[Row]:
    """Ragged conversations, of which some are cut."""
    draw = random.Random(3)
    return [
        _chat(text(draw, draw.randint(1, 30)), text(draw, draw.randint(1, 25)), text(draw, draw.randint(1, 25)))
        for _ in range(STEPS * PAIRS_PER_STEP)
    ]


def model_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=None,
    )  # fmt: skip


@torch.no_grad()
def fill(model: Any) -> Any:
    """Weights by name, in closed form: a parameter's are sines of incommensurate angles, a norm's are near one."""
    for name, parameter in model.named_parameters():
        phase = zlib.crc32(name.encode()) % 1000
        angles = (torch.arange(parameter.numel(), dtype=torch.float64) + phase) * (math.sqrt(5) * 10)
        wave = torch.sin(angles).reshape(parameter.shape)
        parameter.copy_(1 + 0.1 * wave if parameter.ndim == 1 else 0.25 * wave)
    return model


def summary(model: Any) -> dict[str, list[float]]:
    """Of each parameter its norm and its product with a fixed wave, in float64."""
    found = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().double().flatten()
        wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64) * math.sqrt(3))
        found[name] = [float(flat.norm()), float(flat @ wave)]
    return found
