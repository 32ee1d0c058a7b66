"""Writes an adapter as plain PEFT files that others can load, and reads them back before anybody relies on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from lorafocal.card import CARD_FILE, adapter_card
from lorafocal.lineage import Lineage
from lorafocal.model.adapters import features
from lorafocal.model.load import loader_of
from lorafocal.model.saved import TEMPLATE_FILE, WEIGHTS_FILE
from lorafocal.model.serving import serving_section
from lorafocal.model.starts import plain_adapter
from lorafocal.publish import public_name
from lorafocal.tensor_files import check_saved


def save_adapter(
    policy: PeftModel,
    folder: Path,
    lineage: Lineage | None,
    results: Mapping[str, float] | None = None,
    *,
    trained: bool = False,
    values: Mapping[str, Tensor] | None = None,
    chat_template: str | None = None,
) -> None:
    """Fill an unpublished `folder` with the policy's adapter, its lineage, its card, and the `chat_template` of the
    training, which may be another than the base's; and nothing else.

    `results` are measured numbers for the card; `trained` says that a step has changed the adapter; `values` are the
    adapter's parameters by full name, where the policy holds parts of them only. Without a lineage (a base from
    nowhere) there is no card either.

    It loads anywhere on the base as it was before any start (`model.starts.plain_adapter`), which is named by hub id or
    by its folder's last name: a path of this machine is never written. A hub's base is named with its commit, which
    `AutoPeftModelForCausalLM` then loads. The card says what vLLM and llama.cpp would refuse or misread.
    Raises InputError where a tensor is missing, empty, not finite or reads back differently.
    """
    name = policy.active_adapter
    own = policy.peft_config[name]
    plain, state = plain_adapter(policy, values)
    base = own.base_model_name_or_path and public_name(own.base_model_name_or_path)
    revision = own.revision if lineage is None else lineage.base.revision
    policy.peft_config[name] = in_order(replace(plain, base_model_name_or_path=base, revision=revision))
    try:
        with _without_a_card(policy):
            policy.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False, state_dict=state)
        _flatten(folder, name)
        expected = get_peft_model_state_dict(policy, state, adapter_name=name, save_embedding_layers=False)
    finally:
        policy.peft_config[name] = own
    check_saved(folder / WEIGHTS_FILE, expected, trained=trained)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    if lineage is not None:
        lineage.write(folder)
        loader = loader_of(policy.get_base_model().config)
        card = adapter_card(lineage, results, adapter=in_words(plain), loader=loader)
        (folder / CARD_FILE).write_text(card + serving_section(plain), encoding="utf-8")


@contextmanager
def _without_a_card(policy: PeftModel) -> Iterator[None]:
    """PEFT's card knows nothing of this run, and takes as long to write as everything else here."""
    policy.create_or_update_model_card = lambda *_: None
    try:
        yield
    finally:
        del policy.create_or_update_model_card


def in_order(config: LoraConfig) -> LoraConfig:
    """The same adapter, with sorted lists for PEFT's sets of names: a file of sets differs from process to process."""
    config = copy.copy(config)
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))
    return config


def in_words(config: LoraConfig) -> str:
    """What an adapter is, as it is saved: "lora, dora of rank 8, alpha 16"."""
    kind = ", ".join(sorted(features(config), key=lambda word: (word != "lora", word)))
    return f"{kind} of rank {config.r}, alpha {config.lora_alpha:g}"


def _flatten(folder: Path, adapter: str) -> None:
    """PEFT puts an adapter of another name than "default" into a folder of that name."""
    inner = folder / adapter
    if inner.is_dir():
        for file in inner.iterdir():
            file.replace(folder / file.name)
        inner.rmdir()
