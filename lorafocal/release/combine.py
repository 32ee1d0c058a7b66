"""Several adapters of one base as one: the sum of their changes, each times a signed weight.

A weight acts on the change B A as a whole. On A and B apart it would act squared, so that -1 added where it should
subtract, and averaging A and B mixes terms that nobody trained. Concatenated along the rank, the sum is exact:
[w1 s1 B1 | w2 s2 B2] [A1 ; A2] = w1 s1 B1 A1 + w2 s2 B2 A2, with s the scaling that each adapter was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from lorafocal.card import CARD_FILE, adapter_card
from lorafocal.errors import InputError
from lorafocal.lineage import COMBINED, BaseIdentity, Lineage
from lorafocal.model.adapters import features
from lorafocal.model.load import base_fingerprint, loader_of
from lorafocal.model.save import in_order, in_words
from lorafocal.model.saved import WEIGHTS_FILE, SavedAdapter, base_lineage, held, read_config
from lorafocal.model.serving import serving_section
from lorafocal.publish import full_disk_named, sha256
from lorafocal.release.deltas import LOW_RANK, LowRank, changes
from lorafocal.tensor_files import PEFT_PREFIX, check_saved


def combine(adapters: Sequence[SavedAdapter], weights: Sequence[float], folder: Path) -> Path:
    """Fill the empty `folder` with one plain LoRA adapter whose change is the sum of `weights` times the others'.

    Scaling, rsLoRA and patterns are folded into B (float64, rounded once), so that alpha is the rank everywhere: other
    programs, which know one scaling an adapter, read it right. A layer that an adapter leaves alone, or has in a
    smaller rank, is filled with zeros. Its `lorafocal.json` names every parent with its weight. Returns `folder`.

    Raises InputError for weights that are missing, zero or not finite, for adapters of another base, dtype or
    quantisation, by name, and for what is more than a change of linear weights.
    """
    _check_weights(adapters, weights)
    lineages = [lineage_of_saved(saved) for saved in adapters]
    _check_same_base(adapters, lineages)
    parts = [factors(saved) for saved in adapters]
    tensors, rank = concatenated(parts, weights)
    if not all(map(_is_measurable, *_sides(tensors))):
        raise InputError(
            f"--weights {','.join(f'{weight:g}' for weight in weights)}: their sum passes what float32 computes with"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[*{layer for part in parts for layer in part}],
        fan_in_fan_out=any(saved.config.fan_in_fan_out for saved in adapters),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    lineage = combined_lineage(adapters, lineages, weights)
    config.base_model_name_or_path, config.revision = lineage.base.name, lineage.base.revision
    in_order(config).save_pretrained(str(folder))
    with full_disk_named(folder / WEIGHTS_FILE):
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    check_saved(folder / WEIGHTS_FILE, tensors)
    lineage.write(folder)
    loader = loader_of(read_config(adapters[0].base, adapters[0].revision))
    card = adapter_card(lineage, adapter=in_words(config), loader=loader) + serving_section(config)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def factors(saved: SavedAdapter) -> dict[str, LowRank]:
    """The changes of an adapter by its layers' names. Raises InputError by the name of what is no change B A."""
    more = sorted(features(saved.config) - LOW_RANK)
    if more:
        raise InputError(
            f"{saved.folder}: the adapter uses {', '.join(more)}, which no sum of B A can hold. Merge it alone"
            " (`lorafocal merge`), and train the next one on the result"
        )
    found = changes(saved).items()
    return {name.removesuffix(".weight"): change for name, change in found if isinstance(change, LowRank)}


def concatenated(parts: Sequence[Mapping[str, LowRank]], weights: Sequence[float]) -> tuple[dict[str, Tensor], int]:
    """PEFT's tensors of the weighted sum, float32, and their common rank: the largest that a layer needs."""
    layers = sorted({layer for part in parts for layer in part})
    shared = {
        layer: [(w, part[layer]) for w, part in zip(weights, parts, strict=True) if layer in part] for layer in layers
    }
    rank = max(sum(one.a.shape[0] for _, one in ones) for ones in shared.values())
    tensors = {}
    for layer, ones in shared.items():
        if len({(one.b.shape[0], one.a.shape[1]) for _, one in ones}) > 1:
            raise InputError(f"the adapters have {layer} in other shapes: they are of other bases")
        a = torch.cat([one.a.double() for _, one in ones])
        b = torch.cat([weight * one.scaling * one.b.double() for weight, one in ones], dim=1)
        more = rank - a.shape[0]
        tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).float()
        tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).float()
    return tensors, rank


def _sides(tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """All A, and B in the same order."""
    names = [name for name in tensors if ".lora_A." in name]
    return [tensors[name] for name in names], [tensors[name.replace(".lora_A.", ".lora_B.")] for name in names]


def _is_measurable(a: Tensor, b: Tensor) -> bool:
    """Whether the squares of B A stay within float32, as merging measures them."""
    return float(a.double().norm() * b.double().norm()) < torch.finfo(torch.float32).max ** 0.5


def combined_lineage(
    adapters: Sequence[SavedAdapter], lineages: Sequence[Lineage], weights: Sequence[float]
) -> Lineage:
    """Where a combination comes from: what its base contains, then each adapter after those that it contains itself."""
    first = lineages[0]
    stages = list(first.parents[: len(first.parents) - len(first.contained)])
    for saved, lineage, weight in zip(adapters, lineages, weights, strict=True):
        stage = lineage.stage(saved.folder.resolve().name, sha256(saved.folder / WEIGHTS_FILE), COMBINED)
        stages += [*lineage.contained, replace(stage, weight=float(weight))]
    return replace(
        Lineage.untrained(first.base),
        parents=tuple(stages),
        origin=first.origin,
        quantization=adapters[0].quantization,
        dtype=adapters[0].dtype,
        base_config_sha256=first.base_config_sha256,
    )


def lineage_of_saved(saved: SavedAdapter) -> Lineage:
    """The adapter's own lineage; of another tool's, what is known: its base, and what that was made of."""
    if saved.lineage is not None:
        return saved.lineage
    base = BaseIdentity(**base_fingerprint(saved.base, revision=saved.revision))  # type: ignore[arg-type]
    made = base_lineage(saved.base, saved.revision)
    if made is None:
        return Lineage.untrained(base)
    return replace(Lineage.untrained(base), parents=made.parents, origin=made.first_base)


def _check_weights(adapters: Sequence[SavedAdapter], weights: Sequence[float]) -> None:
    if not adapters or len(weights) != len(adapters):
        raise InputError(
            f"--weights: {len(weights)} for {len(adapters)} adapters: give one number each, such as 1,-0.5"
        )
    for saved, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise InputError(f"--weights: {weight} for {saved.folder}: give a finite number, or leave that adapter out")


def _check_same_base(adapters: Sequence[SavedAdapter], lineages: Sequence[Lineage]) -> None:
    """Refuse adapters whose changes are of other weights: their sum would be of none."""
    seen = [
        (f"weights of sha256 {lineage.base.sha256}", held(saved.quantization), f"a base computing in {saved.dtype}")
        for saved, lineage in zip(adapters, lineages, strict=True)
    ]
    for saved, theirs in zip(adapters, seen, strict=True):
        for one, other in zip(seen[0], theirs, strict=True):
            if one != other:
                raise InputError(
                    f"{saved.folder} was trained on {other}, {adapters[0].folder} on {one}: only changes of the same"
                    " weights can be added. Train both on one base in the same precision, or merge one and train the"
                    " other on the result"
                )
    for saved, lineage in zip(adapters, lineages, strict=True):
        configs = {lineages[0].base_config_sha256, lineage.base_config_sha256} - {None}  # earlier versions wrote none
        if len(configs) > 1:
            raise InputError(
                f"{saved.folder} was trained under another config.json of its base than {adapters[0].folder}, by which"
                " the same weights compute otherwise: train one of them again"
            )
