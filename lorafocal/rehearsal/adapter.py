"""The adapter of a rehearsal: the config's own on narrow layers, or one like that which it continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafocal import run
from lorafocal.config import Config, check_config
from lorafocal.data.toy import DIGITS, toy_tokenizer
from lorafocal.lineage import lineage_of
from lorafocal.model.adapters import trainable_token_ids
from lorafocal.model.continued import check_same_quantization
from lorafocal.model.load import load_tokenizer
from lorafocal.model.saved import read_lora_config

EVA_RANK = 4  # its directions come from the answers, which are a few tokens here
_BY_THE_WEIGHTS = ("pissa", "olora", "loftq", "eva", "orthogonal")  # starts of no higher rank than a layer has


def adapter_section(config: Config, quantization: str | None, instead: list[str]) -> dict[str, Any] | None:
    """The section `adapter` of a fresh adapter: the config's own, or one like that which it continues; None for none.

    Raises InputError where that one was trained on a base held otherwise.
    """
    if config.adapter is None:
        return None
    section = config.adapter.model_dump(mode="json")
    if config.adapter.start_from is None:
        return section
    folder = Path(config.adapter.start_from)
    section["start_from"] = None
    if not folder.exists():
        instead.append(f"adapter.start_from: a new LoRA of rank 8, for {folder} is not here")
        return section | {"r": 8, "alpha": 16}
    lora, lineage = read_lora_config(folder), lineage_of(folder)
    # a base known by its shape alone may be stored in 4 bits
    if lineage is not None and (quantization is not None or config.model.shape is None):
        check_same_quantization(folder, lineage, quantization)
    instead.append(f"adapter.start_from: a new adapter of rank {lora.r}, as {folder} has it, trained for one step")
    return section | {
        "r": lora.r,
        "alpha": int(lora.lora_alpha),
        "targets": "all-linear" if isinstance(lora.target_modules, str) else sorted(lora.target_modules or ()),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "modules_to_save": list(lora.modules_to_save or []),
        "trainable_tokens": list(lora.trainable_token_indices or []),
    }


def look_up_tokens(config: Config, instead: list[str]) -> None:
    """Find the trained tokens in the real tokenizer where it is a file here; the tiny model's has them all."""
    if config.adapter is None or not config.adapter.trainable_tokens:
        return
    name, tokens = config.model.name, config.adapter.trainable_tokens
    if (Path(name) / "tokenizer.json").is_file():
        trainable_token_ids(tokens, load_tokenizer(name))
    else:
        instead.append(f"adapter.trainable_tokens: of a made-up vocabulary; whether {name} has them was not looked up")


def layer_names(adapter: Mapping[str, Any] | None) -> list[str]:
    """The layers that the section names."""
    if adapter is None:
        return []
    targets = adapter["targets"]
    names = [] if isinstance(targets, str) else list(targets)
    return [*names, *adapter["rank_pattern"], *adapter["alpha_pattern"], *adapter["modules_to_save"]]


def fitted(adapter: Mapping[str, Any] | None, narrowest: int) -> dict[str, Any] | None:
    """The adapter on narrow layers: token ids among the few there are, a rank that its start can have there."""
    if adapter is None:
        return None
    ids = [token for token in adapter["trainable_tokens"] if isinstance(token, int)]
    places = {token: len(toy_tokenizer()) - 1 - place % len(DIGITS) for place, token in enumerate(ids)}
    fitted = {**adapter, "trainable_tokens": [places.get(token, token) for token in adapter["trainable_tokens"]]}
    if not str(adapter["init"]).startswith(_BY_THE_WEIGHTS):
        return fitted
    most = min(narrowest, EVA_RANK) if adapter["init"] == "eva" else narrowest
    rank = min(adapter["r"], most)
    return fitted | {
        "r": rank,
        "alpha": max(1, round(adapter["alpha"] * rank / adapter["r"])),
        "rank_pattern": {name: min(r, most) for name, r in adapter["rank_pattern"].items()},
    }


def first_adapter(values: Mapping[str, Any], folder: Path, number: int) -> Path:
    """Train a finished adapter, to continue or to compare with, for one supervised step; returns its folder."""
    training = {k: v for k, v in values["training"].items() if not k.startswith(("eval_", "save_"))}
    data = values["data"] | {"eval": None, "held_out": None}
    first = {
        **values,
        "name": f"first-{number}",
        "objective": {"name": "sft"},
        "reference": None,
        "data": data,
        "training": training | {"max_steps": 1, "seed": (training["seed"] + number) % 2**32},
        "evaluation": None,
    }
    return run.train(check_config(first, source="rehearsal"), quiet=True, runs_dir=folder / "runs").folder / "adapter"
