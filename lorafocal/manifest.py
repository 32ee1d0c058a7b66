"""The manifest of a run: what went in, what was put together of it, on which machine, and what its recipe says else.

`run.py` writes it before the first step; `resume`, `provenance`, model cards and reports read it.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorafocal import launch, recipes
from lorafocal.config import Config, layers, load_config
from lorafocal.data.prepare import Part
from lorafocal.data.tokens import TokenizedPair
from lorafocal.model.adapters import features
from lorafocal.model.base_config import config_sha256
from lorafocal.model.load import base_fingerprint, tokenizer_digests
from lorafocal.model.quantized import LoadedBase
from lorafocal.model.saved import WEIGHTS_FILE, read_config
from lorafocal.publish import sha256, text_sha256
from lorafocal.resume import MAY_CHANGE
from lorafocal.run_folder import read_manifest
from lorafocal.schema import Reference
from lorafocal.trainer import FocalPOTrainer
from lorafocal.versions import installed

LIBRARIES = (
    "lorafocal", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors",
    "tokenizers", "datasets", "triton",
)  # fmt: skip
PARTS = {"train": "training", "eval": "held-out"}  # of the data, in words
EXACT = "exact"  # a run that does nothing otherwise than its recipe
NO_DEVIATION = frozenset(
    {
        *("name", "recipe", "reference.store", *MAY_CHANGE),
        *("training.activation_checkpointing", "training.use_cpu"),
    }
)
"""Keys that a run may set as it likes and still repeat its recipe: labels, places, and what cannot reach the weights
but for their last bits."""
PINS = ("model.revision", "data.revision")
"""Keys that a run may also set where its recipe leaves them open."""


def manifest_of(config: Config, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Part]) -> dict[str, Any]:
    """What goes into a run, without any path of this machine but those the config states."""
    reference, start = config.reference, None if config.adapter is None else config.adapter.start_from
    pairs, processes = config.training.pairs_per_step, launch.world_size()
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.sha(),
        "recipe": against_recipe(config),
        "base": _identity(config.model.name, config.model.revision),
        "reference_model": _identity(reference.model, reference.revision)
        if reference is not None and reference.model is not None
        else None,
        "reference_adapters": None if reference is None else _adapters_of(reference),
        "start_from": {"sha256": sha256(Path(start) / WEIGHTS_FILE)} if start is not None else None,
        **tokenizer_digests(tokenizer),
        "data": {name: _part(part) for name, part in data.items()},
        "seeds": {"adapter": config.training.seed, "order": config.training.data_seed},
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in dict.fromkeys((*LIBRARIES, config.model.backend))},
        },
        "effective_batch": {"pairs": pairs, "pairs_per_process": math.ceil(pairs / processes)},
        "processes": processes,
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "machine": {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda, "cpu_cores": os.cpu_count()},
        "may_change_on_resume": MAY_CHANGE,
    }


def _identity(name: str, revision: str | None) -> dict[str, str | None]:
    """Of a model: its name, its weights, and what its config.json has them compute."""
    fingerprint = base_fingerprint(name, revision=revision)
    return fingerprint | {"config_sha256": config_sha256(read_config(name, revision))}


def _adapters_of(reference: Reference) -> dict[str, str] | None:
    """Digests of the finished adapters that a reference is made of, and the guide's; None without any."""
    strategy = reference.strategy
    places = {str(number): folder for number, folder in enumerate(strategy.folders, 1)}
    places |= {"guide": strategy.guide} if strategy.guide is not None else {}
    return {name: sha256(Path(folder) / WEIGHTS_FILE) for name, folder in places.items()} or None


def against_recipe(config: Config) -> dict[str, Any] | None:
    """The recipe that `config` names, and what the run does otherwise: `exact`, or a list; None where it names none.

    Of each deviation: the key, the recipe's value, this run's, and where the recipe's is from. Weights and rows are
    not compared here: their digests stand beside.
    """
    if config.recipe is None:
        return None
    path = recipes.path_of(config.recipe)
    recipe, known = load_config(path), recipes.marks([file for file, _ in layers(path)])
    found = [
        {
            "key": other.key,
            "recipe": other.first,
            "here": other.second,
            "mark": str(mark) if (mark := recipes.mark_of(other.key, known)) else None,
        }
        for other in recipes.differences(
            recipe.model_dump(mode="json"), config.model_dump(mode="json"), ignoring=NO_DEVIATION
        )
        if other.first is not None or other.key not in PINS
    ]
    return {"name": config.recipe, "sha256": recipe.sha(), "deviations": found or EXACT}


def assembled(trainer: FocalPOTrainer, loaded: LoadedBase) -> dict[str, Any]:
    """The sections on what was put together: base, what is trained, engine, layout, kernels and what `auto` became."""
    sections = {
        "loaded": loaded.as_dict(),
        "layout": asdict(trainer.layout),
        "kernels": trainer.kernels,
        "settled": {"tokens_per_pack": trainer.budget.tokens, "recompute": trainer.budget.tier},
        "engine": {"kind": trainer.engine.word, "offload": trainer.args.offload},
        _made(trainer): _trained(trainer),
    }
    if trainer.stored is not None and trainer.stored.checked is not None:
        context, checked = trainer.stored.store.context, trainer.stored.checked
        sections["reference_store"] = {"context": context.as_dict(), "spot_check": checked.as_dict()}
    return sections


def assembled_lines(trainer: FocalPOTrainer, loaded: LoadedBase) -> Iterator[str]:
    """`assembled` for a person, a line each."""
    yield str(loaded)
    trained = _trained(trainer)
    if "rank" in trained:
        yield (
            f"adapter: {', '.join(trained['kind'])} of rank {trained['rank']}; {trained['trainable_parameters']:,}"
            f" parameters on {', '.join(trained['targets'])}"
        )
    else:
        yield f"all {trained['trainable_parameters']:,} parameters are trained, by {trainer.engine.word}"
    for what, choice in trainer.kernels.items():
        yield f"{what}: {choice}"


def _made(trainer: FocalPOTrainer) -> str:
    """What the run leaves: an adapter, or a model."""
    return "adapter" if isinstance(trainer.model, PeftModel) else "model"


def _trained(trainer: FocalPOTrainer) -> dict[str, Any]:
    sizes = {
        "trainable_parameters": sum(parameter.numel() for parameter in trainer.trained.values()),
        "trainable_tensors": sorted(trainer.trained),
    }
    if not isinstance(trainer.model, PeftModel):
        return sizes
    lora = trainer.model.peft_config["default"]
    return {"kind": sorted(features(lora)), "rank": lora.r, "targets": sorted(lora.target_modules), **sizes}


def _part(part: Part) -> dict[str, Any]:
    """Where pairs came from, how many were left out, and the digests of their tokens and scores."""
    return {
        "sources": [asdict(source) for source in part.sources],
        "pairs": len(part.tokens.pairs),
        "left_out": {drop.reason: drop.count for drop in part.drops},
        **({"steps": [asdict(step) for step in part.steps]} if part.steps else {}),
        "tokens_sha256": _tokens_sha256(part.tokens.pairs),
        "scores_sha256": _sha256([[p.score_chosen, p.score_rejected] for p in part.tokens.pairs]),
    }


def _tokens_sha256(pairs: Sequence[TokenizedPair]) -> str:
    return _sha256(
        [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *_turns(pair), *_beside(pair)] for pair in pairs]
    )


def _turns(pair: TokenizedPair) -> list[Any]:
    return [pair.chosen_turns, pair.rejected_turns] if pair.several_turns else []


def _beside(pair: TokenizedPair) -> list[Any]:
    """What a pair has beside its own tokens and scores: nothing, for most."""
    others = [[other.prompt_ids, other.completion_ids, other.score] for other in pair.others]
    beside = {"others": others, "group": pair.group, "embedding": pair.embedding}
    return [{name: value for name, value in beside.items() if value}] if any(beside.values()) else []


def notes_of_changes(run: Path, part: str, pairs: Sequence[TokenizedPair]) -> tuple[str, ...]:
    """A sentence where `pairs`, prepared again, are others than those of the `part` that the run recorded."""
    try:
        recorded = read_manifest(run)["data"][part]["tokens_sha256"]
    except (KeyError, TypeError):
        return ()
    note = f"The {PARTS[part]} data are not those that the run was trained with: they have changed since."
    return (note,) * (recorded != _tokens_sha256(pairs))


def _sha256(value: Any) -> str:
    return text_sha256(json.dumps(value))
