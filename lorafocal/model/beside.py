"""Finished adapters beside the policy's own, on the same base: frozen, never saved, switched to for a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from torch import nn

from lorafocal.compatibility import guide_refusal
from lorafocal.errors import InputError
from lorafocal.lineage import lineage_of
from lorafocal.model.adapters import FROZEN_COPY, add_adapter, features, freeze, of_adapter
from lorafocal.model.continued import check_made_for
from lorafocal.model.head import causal_lm
from lorafocal.model.saved import WEIGHTS_FILE, exchange_adapter, read_lora_config
from lorafocal.model.trained_modules import resolve_tokens
from lorafocal.publish import sha256
from lorafocal.references.strategy import BASE, Strategy
from lorafocal.run_folder import ADAPTER_DIR

GUIDE = f"{FROZEN_COPY}-guide"


def names_beside(strategy: Strategy) -> tuple[str, ...]:
    """What the adapters of `strategy.folders` are called beside the policy's."""
    if strategy.kind == "adapter":
        return (FROZEN_COPY,)
    return tuple(f"{FROZEN_COPY}-{number}" for number, _ in enumerate(strategy.folders, 1))


def add_strategy(policy: PeftModel, strategy: Strategy) -> dict[str, nn.Parameter]:
    """Put the finished adapters of a reference beside the policy's; their tensors by full parameter name."""
    found: dict[str, nn.Parameter] = {}
    for name, folder in zip(names_beside(strategy), strategy.folders, strict=True):
        found |= add_finished(policy, Path(folder), name)
    return found


def add_guide(policy: PeftModel, folder: str) -> dict[str, nn.Parameter]:
    """Put the guide beside the policy's adapter. Raises InputError where the policy's start has changed the base."""
    if refusal := guide_refusal(features(policy.peft_config[policy.active_adapter])):
        raise InputError(f"reference.guide: {refusal}")
    return add_finished(policy, Path(folder), GUIDE)


def add_finished(policy: PeftModel, folder: Path, name: str) -> dict[str, nn.Parameter]:
    """The adapter of `folder` as `name` beside the policy's, which stays active and as trainable as it was.

    A folder of ours or any LoRA adapter that PEFT wrote; its layers, rank and scaling need not be the policy's. Its
    tensors, in fp32 and frozen, by full parameter name. Raises InputError: an adapter that cannot be opened, tensors
    that are missing, strange, of another shape or not finite, or a base other than the one its `lorafocal.json` names.
    """
    base = causal_lm(policy)
    config, lineage = read_lora_config(folder), lineage_of(folder)
    check_made_for(base, folder, lineage)
    plain = replace(
        config,
        base_model_name_or_path=None,
        inference_mode=False,  # PEFT would freeze the active adapter with it
        init_lora_weights=True,  # values that are replaced at once
        eva_config=None,
        lora_dropout=0.0,
    )
    try:
        resolve_tokens(base, plain.trainable_token_indices)
        add_adapter(policy, name, plain)
    except ValueError as error:
        raise InputError(f"{folder}: the adapter does not fit {type(base).__name__}: {error}") from error
    exchange_adapter(policy, folder, name)
    found = of_adapter(policy, name)
    freeze(found)
    return found


def in_words(strategy: Strategy) -> str | None:
    """The reference for lineage and card: its kind, and where that has settings or adapters, these behind a colon.

    Adapters go by the last name of their folder and the start of their weights' sha256: no path of this machine.
    """
    if strategy.kind is None:
        return None
    said = [_named(member) for member in strategy.members or filter(None, [strategy.adapter])]
    said += [f"{key} {_written(value)}" for key, value in strategy.settings().items()]
    if strategy.guide is not None:
        said.append(f"guide {_named(strategy.guide)}")
    return f"{strategy.kind}: {', '.join(said)}" if said else strategy.kind


def _named(member: str) -> str:
    if member == BASE:
        return BASE
    read_lora_config(Path(member))  # that there is one is said better than by its missing file
    place = Path(member).resolve()
    named = place.parent.name if place.name == ADAPTER_DIR else place.name  # a run's own is in RUN/adapter
    return f"{named!r} (sha256 {sha256(Path(member) / WEIGHTS_FILE)[:12]}...)"


def _written(value: object) -> str:
    return " and ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value}"
