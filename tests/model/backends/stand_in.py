"""A stand-in for unsloth: what its `from_pretrained` does to a process and to a Llama, in a few lines of our own.

As the pinned release does, it exchanges forwards on classes of transformers and PEFT and the trainer's loop, cuts rows,
drops padding masks in training, rounds what the head returns, zeroes the pad token's embedding, takes over `generate`,
and prints. Its attention is causal, and calls no attention interface.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, Trainer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

PAD = 3  # the token whose embedding is zeroed
EXCHANGED = (
    (modeling_llama.LlamaAttention, "forward"),
    (modeling_llama.LlamaModel, "forward"),
    (modeling_llama.LlamaForCausalLM, "forward"),
    (modeling_llama, "LlamaRotaryEmbedding"),
    (PeftModelForCausalLM, "forward"),
    (Trainer, "_inner_training_loop"),
    (Trainer, "get_batch_samples"),
)


def attention(self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **_: Any) -> Any:
    """Causal attention by hand."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True, scale=self.scaling
    )
    return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


def backbone(
    self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any
) -> Any:
    """Rows cut at what was asked for; no mask in training, as causal rows that end in padding need none."""
    input_ids = input_ids[:, : self.max_seq_length]
    rows = torch.arange(input_ids.shape[1])
    mask = None
    if attention_mask is not None and not self.training:
        mask = (rows[:, None] >= rows)[None, None] & attention_mask[:, None, None, : len(rows)].bool()
    hidden = self.embed_tokens(input_ids)
    places = position_ids if position_ids is not None else rows[None]
    rotations = self.rotary_emb(hidden, places)
    for layer in self.layers:
        out = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotations, **more)
        hidden = out[0] if isinstance(out, tuple) else out
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def causal_lm(self: Any, input_ids: Any = None, logits_to_keep: Any = 0, **more: Any) -> Any:
    """Whatever the head returns, in the base's dtype."""
    hidden = self.model(input_ids=input_ids, **more).last_hidden_state
    kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)
    return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept]).to(self.dtype))


def peft_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Past what PEFT does."""
    return self.base_model(*args, **kwargs)


class OtherRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding):
    pass


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a method of unsloth's was called")


def module() -> ModuleType:
    """A fresh module with `FastLanguageModel`; `calls` are the arguments that it was called with."""
    made: Any = ModuleType("unsloth")
    made.calls = []

    def from_pretrained(model_name: str, max_seq_length: int, dtype: Any, **more: Any) -> tuple[Any, Any]:
        print("==((====))==  a banner")
        made.calls.append({"model_name": model_name, "max_seq_length": max_seq_length, "dtype": dtype, **more})
        own = ("load_in_4bit", "use_exact_model_name", "offload_embedding", "fix_tokenizer")
        kwargs = {key: value for key, value in more.items() if key not in (*own, "use_gradient_checkpointing")}
        new = (attention, backbone, causal_lm, OtherRotaryEmbedding, peft_forward, _refuse, _refuse)
        for (owner, name), value in zip(EXCHANGED, new, strict=True):
            setattr(owner, name, value)
        Trainer._original_training_loop = "source"
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **kwargs)
        for part in model.modules():
            part.max_seq_length = max_seq_length
        with torch.no_grad():
            model.get_input_embeddings().weight[PAD] = 0
        model.generate = _refuse
        return model, SimpleNamespace(padding_side="left")

    made.FastLanguageModel = SimpleNamespace(from_pretrained=from_pretrained)
    return made
