"""A run folder as training leaves it, with an adapter of any size: what the release tests merge and score."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorafocal.data.held_out import HELD_OUT_FILE, write_held_out
from lorafocal.data.packing import share_prefixes
from lorafocal.data.sources import preferences_from_rows
from lorafocal.data.tokens import TokenizedPair, tokenize_preferences
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.lineage import BaseIdentity, Lineage
from lorafocal.model.base_config import config_sha256
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.policy import prepare_policy, sequence_logps

BETA = 0.1


@dataclass(frozen=True)
class SavedRun:
    base: Path
    folder: Path
    pairs: list[TokenizedPair]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def save_base(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random Llama of 30 thousand parameters with the toy tokenizer."""
    tokenizer = toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """The object in the file `path`, with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantized_checkpoint(base: Path, folder: Path, quantization: str, dtype: str = "bfloat16") -> Path:
    """The base of `base` as others publish it in 4 or 8 bits, with its tokenizer."""
    load_base(str(base), dtype=dtype, quantization=quantization).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def other_tokenizer(folder: Path) -> Path:
    """The base of `folder` beside a tokenizer of the same size in which two words have changed places."""
    file = folder / "tokenizer.json"
    record = json.loads(file.read_text())
    words = record["model"]["vocab"]
    words["0"], words["1"] = words["1"], words["0"]
    file.write_text(json.dumps(record))
    return folder


def plant_adapter(model: PreTrainedModel, *, std: float, **settings: object) -> PeftModel:
    """LoRA of rank 4 whose delta W has about this standard deviation in every adapted layer."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        for module in policy.modules():
            if hasattr(module, "lora_B") and "default" in module.lora_B:
                delta = module.get_delta_weight("default")
                module.lora_B["default"].weight.mul_(std / delta.std())
    return policy


def held_out_pairs(count: int = 12) -> list[TokenizedPair]:
    rows = preferences_from_rows(toy_preferences(count, seed=3, held_out=True), "toy").pairs
    return tokenize_preferences(rows, toy_tokenizer(), max_length=64).pairs


def logps_of(model: PreTrainedModel, pairs: list[TokenizedPair]) -> Tensor:
    """Of the pairs in one pack, (2B,), without a gradient."""
    prepare_policy(model.eval())
    with torch.no_grad():
        return torch.cat(sequence_logps(model, share_prefixes(pairs)))


def save_run(
    root: Path,
    *,
    std: float = 0.05,
    tied: bool = False,
    base_dtype: torch.dtype = torch.bfloat16,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    **settings: object,
) -> SavedRun:
    """Base in `root/base`, run in `root/run`; `dtype`, `quantization`: of training; `settings` go to LoraConfig."""
    base, folder = save_base(root / "base", tied=tied, dtype=base_dtype), root / "run"
    policy = plant_adapter(LlamaForCausalLM.from_pretrained(base), std=std, **settings)
    policy.peft_config["default"].base_model_name_or_path = base.name
    policy.save_pretrained(folder / "adapter")
    lineage = Lineage(
        base=BaseIdentity(**base_fingerprint(str(base))),
        objective={"name": "focalpo", "beta": BETA, "gamma": 0.05},
        steps=3,
        pairs_seen=24,
        quantization=quantization,
        base_config_sha256=config_sha256(LlamaConfig.from_pretrained(base)),
    )
    lineage.write(folder / "adapter")
    model = {"name": str(base), "dtype": dtype, "quantization": quantization}
    config = {"name": "run", "model": model, "data": {"max_length": 64}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    pairs = held_out_pairs()
    write_held_out(folder / HELD_OUT_FILE, pairs)
    return SavedRun(base, folder, pairs)
