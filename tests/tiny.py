"""Tiny models and made-up pairs that tests build in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from lorafocal.arguments import FocalPOConfig
from lorafocal.data.tokens import TokenizedPair
from lorafocal.model.adapters import attach_lora
from lorafocal.trainer import FocalPOTrainer

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "mistral": lambda **more: MistralConfig(**SIZES, **({"sliding_window": 5} | more)),
}


def tiny_base(kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random two-layer base, always the same one, larger weights than usual so that differences show."""
    torch.manual_seed(0)
    return enlarged(AutoModelForCausalLM.from_config(CONFIGS[kind](**more))).to(dtype).requires_grad_(False)


def with_a_wide_norm(root: Path) -> PreTrainedModel:
    """A bf16 base that keeps one weight in fp32, as some keep their routers."""
    model = tiny_base(dtype=torch.bfloat16)
    model.model.norm.float()
    return model


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with matrices four times as large, so that what tokens do to each other shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | more))


def tiny_policy(
    kind: str = "llama", dtype: torch.dtype = torch.float32, *, trained: bool = True, **more: Any
) -> PeftModel:
    """A base with a LoRA adapter; `trained` gives it a non-zero `lora_B`."""
    policy = attach_lora(tiny_base(kind, dtype, **more), lora())
    return disturb(policy) if trained else policy


def disturb(policy: PeftModel, scale: float = 0.05) -> PeftModel:
    """Give every lora_B reproducible non-zero values, but those of a frozen copy."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name and ".reference." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return policy


def pairs(count: int, *, longest: int = 12, seed: int = 1) -> list[TokenizedPair]:
    """Made-up pairs with ragged lengths; among the first three, one-token prompts and one-token answers."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    def ragged() -> tuple[int, int, int]:
        return tuple((torch.randint(longest, (3,), generator=generator) + 1).tolist())

    fixed = [(1, 1, 1), (1, 7, 3), (9, 1, 12)]
    lengths = fixed[:count] + [ragged() for _ in range(count - 3)]
    return [TokenizedPair(f"pair-{i}", *map(tokens, sizes)) for i, sizes in enumerate(lengths)]


def trainer(
    folder: Path, train: list[TokenizedPair], held_out: list[TokenizedPair] | None = None, **settings: Any
) -> FocalPOTrainer:
    """A trainer on a tiny Llama; settings are FocalPOConfig's, beside `model`, `ref_model` and `peft_config`."""
    model, ref_model = settings.pop("model", None), settings.pop("ref_model", None)
    peft_config = settings.pop("peft_config", None if model is not None else lora())
    defaults = {
        "pairs_per_step": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "tokens_per_pack": 64,
    }
    return FocalPOTrainer(
        tiny_base() if model is None else model,
        ref_model,
        args=FocalPOConfig(output_dir=str(folder), **(defaults | settings)),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=peft_config,
    )


def adapter_gradients(policy: PeftModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together."""
    assert ours.keys() == theirs.keys()
    difference = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm()
    return float(difference / torch.stack([tensor.norm() for tensor in theirs.values()]).norm())


def weights(run: FocalPOTrainer) -> dict[str, Tensor]:
    """A copy of all that a run trains, by full parameter name."""
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}
