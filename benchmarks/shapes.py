"""Models with random weights at the shapes of well-known ones, built in memory on the device."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from lorafocal.model.quantized import bitsandbytes_config, library

SEED = 0
_LONG = {"max_position_embeddings": 8192}
_OF_64 = {"head_dim": 64, "num_key_value_heads": 8}
_OF_128 = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "tiny": (  # 2.9 million parameters in the layers, 1 million in the head; heads of 64 channels
        LlamaConfig,
        {
            "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 4096,
        },
    ),
    "stories-42m": (  # llama2.c's: 25 million parameters in the layers, 16 million in the tied head
        LlamaConfig,
        {
            "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
            "vocab_size": 32000, "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": (LlamaConfig, {"intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 5e5, **_OF_128}),
    "mistral-7b": (MistralConfig, {"intermediate_size": 14336, "vocab_size": 32000, "sliding_window": None, **_OF_128}),
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "vocab_size": 128256, "rope_theta": 5e5, "tie_word_embeddings": True, **_OF_64,
        },
    ),
}  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    kind, values = SHAPES[name]
    return kind(bos_token_id=None, eos_token_id=1, pad_token_id=0, **_LONG, **values)


def lora_config() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def random_base(
    name: str, *, dtype: torch.dtype, device: str, quantization: str | None = None, layers: int | None = None
) -> PreTrainedModel:
    """The same weights in every process. A quantised base is made a layer at a time: the float one is never whole."""
    torch.manual_seed(SEED)
    config = config_of(name)
    count = layers or config.num_hidden_layers
    config.num_hidden_layers = 1
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            kind = type(model.model.layers[0])
            config.num_hidden_layers = model.config.num_hidden_layers = count
            model.model.layers = nn.ModuleList(_layer(kind, config, i, quantization) for i in range(count))
    finally:
        torch.set_default_dtype(usual)
    if quantization is not None:
        model.config.quantization_config = bitsandbytes_config(quantization, dtype)
        model.is_loaded_in_4bit = True  # PEFT looks here
    return model.requires_grad_(False)


def _layer(kind: type[nn.Module], config: PreTrainedConfig, number: int, quantization: str | None) -> nn.Module:
    """A decoder layer with small random matrices."""
    layer = kind(config, number)
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range)
    for name, linear in list(layer.named_modules()):
        if quantization is not None and isinstance(linear, nn.Linear):
            layer.set_submodule(name, _four_bit(linear, quantization))
    return layer


def _four_bit(linear: nn.Linear, quantization: str) -> nn.Module:
    bnb = library()
    weight = linear.weight
    asked = bitsandbytes_config(quantization, weight.dtype)
    words = {
        "quant_type": asked.bnb_4bit_quant_type, "compress_statistics": asked.bnb_4bit_use_double_quant,
        "quant_storage": asked.bnb_4bit_quant_storage,
    }  # fmt: skip
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, device="meta", **words
    )
    made.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, module=made, **words)
    return made.to(weight.device)
