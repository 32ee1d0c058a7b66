"""The manifest of a run: what went in, what was put together of it, and on which machine.

`run.py` writes it before the first step; `resume`, `provenance`, model cards and reports read it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorafocal import launch
from lorafocal.config import Config
from lorafocal.data.prepare import Part
from lorafocal.model.adapters import features
from lorafocal.model.load import base_fingerprint
from lorafocal.model.quantized import LoadedBase
from lorafocal.resume import MAY_CHANGE
from lorafocal.trainer import FocalPOTrainer

LIBRARIES = ("lorafocal", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers")


def manifest_of(config: Config, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Part]) -> dict[str, Any]:
    """What goes into a run, without any path of this machine but those the config states."""
    reference = config.reference
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.sha(),
        "base": base_fingerprint(config.model.name, revision=config.model.revision),
        "reference_model": base_fingerprint(reference.model, revision=reference.revision)
        if reference is not None and reference.model is not None
        else None,
        "chat_template_sha256": _sha256(tokenizer.chat_template or ""),
        "data": {name: _part(part) for name, part in data.items()},
        "seeds": {"adapter": config.training.seed, "order": config.training.data_seed},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in dict.fromkeys((*LIBRARIES, config.model.backend))},
        },
        "processes": launch.world_size(),
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "may_change_on_resume": MAY_CHANGE,
    }


def assembled(trainer: FocalPOTrainer, loaded: LoadedBase) -> dict[str, Any]:
    """The sections on what was put together: base, adapter, layout, kernels and what `auto` became."""
    sections = {
        "loaded": loaded.as_dict(),
        "layout": asdict(trainer.layout),
        "kernels": trainer.kernels,
        "settled": {"tokens_per_pack": trainer.budget.tokens, "recompute": trainer.budget.tier},
        "adapter": _adapter(trainer),
    }
    if trainer.stored is not None and trainer.stored.checked is not None:
        context, checked = trainer.stored.store.context, trainer.stored.checked
        sections["reference_store"] = {"context": context.as_dict(), "spot_check": checked.as_dict()}
    return sections


def assembled_lines(trainer: FocalPOTrainer, loaded: LoadedBase) -> Iterator[str]:
    """`assembled` for a person, a line each."""
    adapter = _adapter(trainer)
    yield str(loaded)
    yield (
        f"adapter: {', '.join(adapter['kind'])} of rank {adapter['rank']}; {adapter['trainable_parameters']:,}"
        f" parameters on {', '.join(adapter['targets'])}"
    )
    for what, choice in trainer.kernels.items():
        yield f"{what}: {choice}"


def _adapter(trainer: FocalPOTrainer) -> dict[str, Any]:
    lora = trainer.model.peft_config["default"]
    return {
        "kind": sorted(features(lora)),
        "rank": lora.r,
        "targets": sorted(lora.target_modules),
        "trainable_parameters": sum(p.numel() for p in trainer.trained.values()),
        "trainable_tensors": sorted(trainer.trained),
    }


def _part(part: Part) -> dict[str, Any]:
    """Where pairs came from, how many were left out, and the hash of their tokens."""
    return {
        "sources": [asdict(source) for source in part.sources],
        "pairs": len(part.tokens.pairs),
        "left_out": {drop.reason: drop.count for drop in part.drops},
        "tokens_sha256": _sha256([[p.prompt_ids, p.chosen_ids, p.rejected_ids] for p in part.tokens.pairs]),
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
