"""Tiny random models of the architectures that transformers has: two layers, hidden size 32, enlarged weights.

A family is a model type, or a model type and a variant ("llama tied"). One that the installed transformers does not
know is left out by `known_families`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lorafocal.model.adapters import wrap
from tests.tiny import SIZES, disturb, enlarged

_TIED = {"tie_word_embeddings": True}
_DIM = {"head_dim": 8}
_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_EXPERTS = _ROUTED | {"num_experts": 4}
_GROUPED = _ROUTED | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MAMBA = {"mamba_chunk_size": 8, "mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_STATE = {"state_size": 4}

MUST_TRAIN_PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": _TIED,
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen2 tied": _TIED,
    "qwen3": _DIM,
    "gemma3_text": _DIM | _WINDOW,
    "gemma2": _DIM | _WINDOW | _CAPS,
    "phi3": {"sliding_window": 5},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "cohere2": _WINDOW,
    "gpt2": _GPT2 | {"n_positions": 64},
}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bert": {"is_decoder": False},
    "biogpt": {},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": _GPT2 | {"rotary_dim": 4},
    "cohere": {},
    "deepseek_v2": _LATENT | _GROUPED | {"num_key_value_heads": 4},
    "deepseek_v3": _LATENT | _GROUPED | {"num_key_value_heads": 4},
    "diffllama": {},
    "doge": {},
    "ernie4_5": _DIM,
    "ernie4_5_moe": _ROUTED | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": _WINDOW,
    "falcon": {"alibi": False, "multi_query": False},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "falcon_mamba": _STATE,
    "gemma": _DIM,
    "gemma4_text": _DIM | _WINDOW | {"vocab_size_per_layer_input": 97},
    "glm": _DIM,
    "glm4": _DIM,
    "glm4_moe": _DIM | _GROUPED,
    "gpt_bigcode": _GPT2 | {"n_positions": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox": {},
    "gpt_oss": _DIM | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 8.0},
    "granitemoehybrid": _MAMBA | {"num_local_experts": 2, "layer_types": ["mamba", "attention"]},
    "helium": _DIM,
    "hunyuan_v1_dense": _DIM,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2}
    | {"mamba_d_state": 4},
    "lfm2": {"full_attn_idxs": [1]},
    "llama4_text": _DIM | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
    "mamba": _STATE,
    "mamba2": _STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": _LINEAR | {"num_local_experts": 2, "block_size": 8},
    "ministral": _DIM | _WINDOW,
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo3": _WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": _GPT2 | {"n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": _EXPERTS
    | _DIM
    | _LINEAR
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 5},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": _DIM,
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
    "vaultgemma": _DIM | _WINDOW | _CAPS,
    "xlstm": {},
}

_IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_IMAGES |= {"image_size": 28, "patch_size": 14}
_QWEN_IMAGES = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
_QWEN_TEXT = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
IMAGE_TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text"} | SIZES | _DIM | _WINDOW,
        "vision_config": _IMAGES,
        "mm_tokens_per_image": 4,
    },
    "idefics3": {"text_config": {"model_type": "llama"} | SIZES, "vision_config": _IMAGES},
    "internvl": {
        "text_config": {"model_type": "qwen2"} | SIZES,
        "vision_config": _IMAGES | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llava": {
        "text_config": {"model_type": "llama"} | SIZES,
        "vision_config": {"model_type": "clip_vision_model"} | _IMAGES,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": 5} | SIZES,
        "vision_config": {"model_type": "pixtral"} | _IMAGES,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma"} | SIZES | _DIM,
        "vision_config": {"model_type": "siglip_vision_model"} | _IMAGES,
        "projection_dim": 32,
    },
    "qwen2_5_vl": {"text_config": _QWEN_TEXT, "vision_config": _QWEN_IMAGES},
    "qwen2_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    },
    "qwen3_vl": {
        "text_config": _QWEN_TEXT | _DIM,
        "vision_config": _QWEN_IMAGES | {"deepstack_visual_indexes": [0]},
    },
}
FAMILIES = {name: SIZES | own for name, own in (MUST_TRAIN_PACKED | OTHERS).items()} | IMAGE_TEXT


def known_families() -> list[str]:
    return [name for name in FAMILIES if name.split()[0] in CONFIG_MAPPING]


def random_model(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The family's model, frozen, in evaluation mode; always the same one."""
    config = AutoConfig.for_model(name.split()[0], **FAMILIES[name])
    door = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    torch.manual_seed(0)
    model = enlarged(door.from_config(config, dtype=torch.float32)).to(dtype)
    if dtype == torch.float64 and any("expert" in part for part, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the grouped matrix product knows no float64
    return model.requires_grad_(False).eval()


def text_policy(name: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """The family's model with a LoRA adapter, away from its start, on every linear layer of its text part."""
    model = random_model(name, dtype)
    head, text = model.get_output_embeddings(), set(model.get_decoder().modules())
    targets = [
        part
        for part, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and module in text
    ]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2")
    return disturb(wrap(model, config))
