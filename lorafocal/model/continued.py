"""Go on training a saved adapter: strictly loaded, on the base it was trained on, and what came before remembered."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, BaseIdentity, Lineage, Stage, lineage_of
from lorafocal.model.base_config import config_sha256
from lorafocal.model.load import base_fingerprint
from lorafocal.model.master import arithmetic_of
from lorafocal.model.quantized import quantization_of
from lorafocal.model.saved import (
    WEIGHTS_FILE,
    base_lineage,
    check_same_base,
    held,
    put_on,
    read_config,
    read_lora_config,
)
from lorafocal.publish import sha256
from lorafocal.tensor_files import dtype_word

_STAGES = "_lorafocal_stages"  # an attribute of the policy: the adapters that its own contains, the oldest first


def continue_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of `folder` on the loaded `base`, in fp32 and trainable, as `FocalPOTrainer` takes it.

    Raises InputError: an adapter that cannot be opened (by the name of the variant), tensors that are missing, strange,
    of another shape or not finite, or a base other than the one its `lorafocal.json` names, by digest or by
    quantisation.
    """
    config, lineage = read_lora_config(folder), lineage_of(folder)
    check_made_for(base, folder, lineage)
    policy = put_on(base, folder, config, trainable=True)
    weights = sha256(folder / WEIGHTS_FILE)
    stage = Stage(folder.resolve().name, weights, CONTINUED)
    if lineage is not None:
        stage = lineage.stage(stage.adapter, weights, CONTINUED)
    before = lineage.contained if lineage is not None else ()
    setattr(policy, _STAGES, (*before, stage))
    return policy


def check_made_for(base: PreTrainedModel, folder: Path, lineage: Lineage | None) -> None:
    """Refuse an adapter whose `lineage` names another base than `base`, by digest or by quantisation."""
    if lineage is None:
        return
    name, revision = place_of(base)
    if name is None:
        raise InputError(f"{folder} names the base it was trained on, but the base given was loaded from nowhere")
    check_same_quantization(folder, lineage, quantization_of(base))
    check_same_base(folder, lineage, name, revision, remedy="Give it as the base (`model.name` in a config)")


def check_same_quantization(folder: Path, lineage: Lineage, given: str | None) -> None:
    """Refuse a base held otherwise than in training: its weights are rounded otherwise, so it is another model."""
    if given == lineage.quantization:
        return
    raise InputError(
        f"{folder} was trained on {held(lineage.quantization)}, but is to go on with {held(given)}: set"
        f" `model.quantization: {lineage.quantization or 'null'}` as then, or merge it first (`lorafocal merge`) and"
        " train a fresh adapter on the result"
    )


def place_of(base: PreTrainedModel) -> tuple[str | None, str | None]:
    """Hub id or folder that a model was loaded from, and the commit; None for a model from nowhere."""
    config: Any = base.config
    return config._name_or_path or None, getattr(config, "_commit_hash", None)


def mark_fresh(policy: PeftModel) -> None:
    """Say that the policy's adapter contains no earlier one: not every start is zero (LoftQ, PiSSA, OLoRA, random)."""
    setattr(policy, _STAGES, ())


def stages_of(policy: PeftModel) -> tuple[Stage, ...]:
    """The adapters that the policy's own contains before it is trained: none if it is fresh.

    One that neither `continue_adapter` nor `mark_fresh` has seen is taken to be fresh where its B is zero; otherwise it
    gets the digest that its weights file has, if PEFT wrote it in fp32.
    """
    stages: tuple[Stage, ...] | None = getattr(policy, _STAGES, None)
    if stages is not None:
        return stages
    tensors = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        return ()
    data = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"format": "pt"})
    return (Stage(policy.active_adapter, hashlib.sha256(data).hexdigest(), CONTINUED),)


def lineage_on(base: PreTrainedModel, stages: tuple[Stage, ...], **training: Any) -> Lineage | None:
    """The lineage of an adapter on `base` that contains `stages`; `training` is what `Lineage` records of it.

    None for a base that was never loaded from anywhere. Reads the base's weights files for their digest.
    """
    name, revision = place_of(base)
    if name is None:
        return None
    identity = BaseIdentity(**base_fingerprint(name, revision=revision))  # type: ignore[arg-type]
    config = config_sha256(read_config(name, revision))
    made = base_lineage(name, revision)
    before, origin = ((), None) if made is None else (made.parents, made.first_base)
    word, dtype = quantization_of(base), dtype_word(arithmetic_of(base))
    parents = (*before, *stages)
    lineage = Lineage(identity, parents=parents, origin=origin, quantization=word, dtype=dtype, **training)
    return replace(lineage, base_config_sha256=config)
