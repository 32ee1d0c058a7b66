"""Merge an adapter into its base: float32 arithmetic, measured rounding, a gate on held-out pairs, complete
or absent."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import cached_file

from lorafocal.card import CARD_FILE, merged_card
from lorafocal.compatibility import MERGES
from lorafocal.data.held_out import HELD_OUT_FILE, load_pairs
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE, MERGED, BaseIdentity, Lineage
from lorafocal.model.adapters import features
from lorafocal.model.load import base_fingerprint, load_tokenizer
from lorafocal.model.quantized import dequantized_weight, word_of
from lorafocal.model.saved import (
    WEIGHTS_FILE,
    SavedAdapter,
    cast_parameters,
    lora_layers,
    open_adapter,
    read_adapter,
    read_config,
)
from lorafocal.publish import published, sha256, write_atomically
from lorafocal.release.combine import combine, lineage_of_saved
from lorafocal.release.dequantize import dequantize, float_layer
from lorafocal.release.gate import MAX_DRIFT, GateEvidence, GateReport, check, compare, gate_table
from lorafocal.release.measure import Live, is_tied, live_logps, merged_logps
from lorafocal.release.onto import AUTO, ORIGINAL, TRAINED, Measured, bases_to_try, least_drift, why_kept

DTYPES = ("bfloat16", "float16", "float32")
GATE_DTYPES = ("bfloat16", "float32")
FEW_PAIRS = 20  # below this the gate says little
KEPT_WARNING = 0.9  # share of a layer's delta below which the report warns (row 43)
REPORT_FILE = "merge.json"

# Everything a merged model may consist of; a base with other files is refused, not half copied (row 52).
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_ALLOWED = frozenset(
    set(_PROCESSORS)
    | {CARD_FILE, LINEAGE_FILE, REPORT_FILE}
    | {
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    | {"special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt"}
)


@dataclass(frozen=True, slots=True)
class LayerSurvival:
    """What the cast to the output dtype left of one layer's delta D = scaling * B A, with Q the cast and W
    the base.

    `kept` = <Q(W + D) - Q(W), D> / <D, D>: 1 means that the stored change is on average the learned one, 0
    that it rounded away. `error` = |Q(W + D) - (W + D)| / |D|, Frobenius norms: rounding against what was
    learned; it counts the rounding of W too where W is finer than the output. `delta_norm` is |D|.
    """

    layer: str
    kept: float
    error: float
    delta_norm: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. `as_dict` names no folder of this machine: it is published as `merge.json`.

    `quantization` is what the base was quantised to in training; `onto` is "trained" where the merge was into what
    training saw (such a base de-quantised), "original" where into the floats that were quantised, which `base` then is.
    `gates` holds the measurement of each base that was tried, `gate` that of the one that was kept; `evidence` is what
    that was measured on, pair by pair.
    """

    out: Path
    dtype: str
    base: BaseIdentity
    quantization: str | None
    onto: str
    survival: tuple[LayerSurvival, ...]
    gate: GateReport
    gates: Mapping[str, GateReport]
    evidence: GateEvidence
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "base": asdict(self.base),
            "onto": self.onto,
            "base_dequantized_from": self.quantization if self.onto == TRAINED else None,
            "gate": self.gate.as_dict(),
            "gates": {onto: gate.as_dict() for onto, gate in self.gates.items()},
            "survival": [asdict(layer) for layer in self.survival],
            "notes": list(self.notes),
        }

    def gate_table(self) -> str:
        """The gate for a person, a column for each base that was tried."""
        return gate_table({f"onto the {onto} base": gate for onto, gate in self.gates.items()})

    def table(self) -> str:
        """Survival, gate and notes for a person; the table of all layers is in `merge.json`."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([survival_table(self.survival, self.dtype), self.gate_table(), *notes])


def merge_adapter(
    adapter: Path | Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    onto: str = AUTO,
    original: str | None = None,
    base: str | None = None,
    pairs: Path | None = None,
    dtype: str | None = None,
    gate_dtype: str = "float32",
    max_drift: float = MAX_DRIFT,
) -> MergeReport:
    """Merge an adapter folder into its base and publish the model as the new folder `out`.

    Several adapters of one base are summed first, each with its weight (1 where `weights` is None), which acts on its
    B A (`release.combine`).

    An adapter that was trained on a quantised base is merged into those weights de-quantised (`onto` "trained"), into
    the floats they were made of ("original"), or into the one of the two that ends nearer to the live adapter on the
    held-out pairs ("auto"); never into 4 or 8 bits, which would round most of it away (rows 41, 42). `original` names
    the floats where the base is stored quantised.

    `base` overrides where the base is found (`model.saved.read_adapter` has the order). `pairs` are the held-out pairs
    of the gate: preference rows or token ids, by default `held_out.jsonl` of the (first) run. `dtype` is what is
    stored, by default what the run trained in. The gate (`release.gate`) computes in `gate_dtype`; bfloat16 halves its
    memory, and the noise of its arithmetic then counts as drift. `max_drift` is the share of the learned effect that
    may be lost.

    One model is in memory at a time. `out` appears only when complete and through the gate.

    Raises InputError for input that cannot be merged, its subclass GateFailure where the merged model is not
    the adapter any more.
    """
    _check_request(dtype, gate_dtype, max_drift)
    with published(out, record=False) as folder:
        folders = [adapter] if isinstance(adapter, Path) else list(adapter)
        saved = _one_adapter(folders, weights, base, folder)
        _check_mergeable(saved)
        bases = bases_to_try(saved, onto, original)
        dtype = dtype or saved.dtype
        tokenizer = load_tokenizer(saved.base, saved.revision)
        held_out = load_pairs(_pairs_file(folders[0], pairs), tokenizer, **saved.tokenization)
        live = live_logps(saved, held_out, gate_dtype)
        tried = [
            _write_and_measure(saved, live, folder / choice, original=original, dtype=dtype, max_drift=max_drift)
            for choice in bases
        ]
        kept = least_drift(tried)
        check(kept.gate, *_other_base(kept, bases, saved))
        lineage = _lineage(saved, kept.onto, original)
        notes = saved.notes + why_kept(kept, tried, saved) + kept.written.notes
        report = MergeReport(
            out=out,
            dtype=dtype,
            base=lineage.base,
            quantization=saved.quantization,
            onto=kept.onto,
            survival=kept.written.survival,
            gate=kept.gate,
            gates={one.onto: one.gate for one in tried},
            evidence=live.evidence(kept.merged),
            notes=notes + _survival_notes(kept.written.survival, dtype) + _evidence_notes(len(held_out)),
        )
        _keep_only(kept.folder, folder)
        tokenizer.save_pretrained(folder)
        _copy_processors(saved, folder)
        _write_papers(folder, lineage, report)
        _check_files(folder)
    return report


def _one_adapter(
    folders: Sequence[Path], weights: Sequence[float] | None, base: str | None, place: Path
) -> SavedAdapter:
    """The adapter to merge: the one there is, or the weighted sum of several, written into `place`."""
    adapters = [read_adapter(folder, base=base) for folder in folders]
    if len(adapters) == 1 and weights is None:
        return adapters[0]
    combined = place / "combined"
    combined.mkdir()
    combine(adapters, [1.0] * len(adapters) if weights is None else weights, combined)
    first = adapters[0]
    one = read_adapter(combined, base=first.base)
    return replace(one, revision=first.revision, tokenization=first.tokenization, notes=first.notes)


def _write_and_measure(
    saved: SavedAdapter, live: Live, folder: Path, *, original: str | None, dtype: str, max_drift: float
) -> Measured:
    """Merge into the base that `folder` is named after, and hold what was written against the live adapter."""
    onto = folder.name
    folder.mkdir()
    written = write_merged(saved, folder, onto=onto, original=original, dtype=dtype)
    merged, served = merged_logps(folder, live, dtype=dtype, tied=written.tied)
    gate = compare(
        live.pairs,
        live=live.logps,
        reference=live.reference,
        merged=merged,
        served=served,
        dtype=dtype,
        gate_dtype=live.dtype,
        max_drift=max_drift,
    )
    return Measured(onto, folder, written, merged, gate)


def _keep_only(part: Path, folder: Path) -> None:
    """Move the files of `part`, one of the folders within `folder`, up into it; all other folders go."""
    for file in list(part.iterdir()):
        file.replace(folder / file.name)
    for other in list(folder.iterdir()):
        if other.is_dir():
            shutil.rmtree(other)


def _other_base(kept: Measured, bases: Sequence[str], saved: SavedAdapter) -> tuple[str, ...]:
    """The way out of a failed gate that a forced choice of the base leaves."""
    if saved.quantization is None or len(bases) > 1:
        return ()
    other = ORIGINAL if kept.onto == TRAINED else TRAINED
    return (f"merge onto the {other} base (--onto auto tries both)",)


@torch.no_grad()
def fold(policy: PeftModel, dtype: torch.dtype) -> tuple[LayerSurvival, ...]:
    """Put every layer's delta into its base weight, in place: W + D in float32 from the stored tensors, then
    the cast.

    D is PEFT's `get_delta_weight`, so plain and rank-stabilised scaling and per-layer ranks are PEFT's own.
    W of a quantised layer is its weight de-quantised, and the layer becomes a plain one. The adapters stay on the
    model; take the base out with `policy.unload()`.
    """
    survival = []
    for name, layer in lora_layers(policy).items():
        base = layer.get_base_layer()
        quantized = word_of(base) is not None
        weight = dequantized_weight(base) if quantized else base.weight
        delta = layer.get_delta_weight("default")
        stored = (weight.float() + delta).to(dtype)
        survival.append(measure_survival(name, weight, delta, stored))
        if quantized:
            layer.base_layer = float_layer(base, stored)
        else:
            weight.data = stored
    return tuple(survival)


def measure_survival(layer: str, weight: Tensor, delta: Tensor, stored: Tensor) -> LayerSurvival:
    """`LayerSurvival` of one layer; `weight` and `delta` as before the cast, sums in float64. A zero delta is
    kept."""
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if norm == 0:
        return LayerSurvival(layer, 1.0, 0.0, 0.0)
    change = stored.float() - weight.to(stored.dtype).float()
    kept = float((change * delta).sum(dtype=torch.float64)) / norm**2
    rounding = stored.float() - (weight.float() + delta)
    return LayerSurvival(layer, kept, float(torch.linalg.vector_norm(rounding, dtype=torch.float64)) / norm, norm)


def survival_table(survival: Sequence[LayerSurvival], dtype: str) -> str:
    """The layers that keep least and most, and the median, one a line."""
    worst, best = _worst(survival), max(survival, key=lambda layer: layer.kept)
    median = statistics.median(layer.kept for layer in survival)
    error = statistics.median(layer.error for layer in survival)
    return "\n".join(
        [
            f"share of the learned change that {dtype} keeps, {len(survival)} layers",
            f"  least   {worst.kept:8.2%}  rounding {worst.error:.2g} of the change  ({worst.layer})",
            f"  median  {median:8.2%}  rounding {error:.2g} of the change",
            f"  most    {best.kept:8.2%}  rounding {best.error:.2g} of the change  ({best.layer})",
        ]
    )


def _worst(survival: Sequence[LayerSurvival]) -> LayerSurvival:
    return min(survival, key=lambda layer: layer.kept)


def _survival_notes(survival: Sequence[LayerSurvival], dtype: str) -> tuple[str, ...]:
    low = [layer for layer in survival if not layer.kept >= KEPT_WARNING]
    if not low:
        return ()
    worst = _worst(low)
    return (
        f"{len(low)} of {len(survival)} layers keep less than {KEPT_WARNING:.0%} of the learned change "
        f"in {dtype} (worst: {worst.layer}, {worst.kept:.0%}). Merge with --dtype float32, or publish the "
        "adapter without merging it.",
    )


def _evidence_notes(pairs: int) -> tuple[str, ...]:
    if pairs >= FEW_PAIRS:
        return ()
    return (f"the gate saw {pairs} held-out pairs only, which may miss what a merge broke; give more by --pairs",)


def _check_mergeable(saved: SavedAdapter) -> None:
    """Refuse what is more than a delta of linear weights, by the compatibility table's word for it."""
    more = sorted(features(saved.config) - MERGES)
    if more:
        raise InputError(
            f"{saved.folder}: the adapter uses {', '.join(more)}, which merge does not fold into a base. Publish the"
            " adapter as it is: PEFT, `lorafocal score` and `adapter.start_from` open it"
        )


def _check_request(dtype: str | None, gate_dtype: str, max_drift: float) -> None:
    for option, value, known in (("--dtype", dtype, DTYPES), ("--gate-dtype", gate_dtype, GATE_DTYPES)):
        if value is not None and value not in known:
            raise InputError(f"{option} {value!r}: choose one of {', '.join(known)}.")
    if not 0 < max_drift < 1:
        raise InputError(
            f"--max-drift {max_drift!r}: give the share of the learned effect that may be lost, in (0, 1)."
        )


def _pairs_file(adapter: Path, pairs: Path | None) -> Path:
    if pairs is not None:
        return pairs
    own = adapter.resolve().parent / HELD_OUT_FILE
    if not own.is_file():
        raise InputError(f"no {HELD_OUT_FILE} lies beside {adapter}, so nothing can check the merge: say --pairs FILE.")
    return own


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_merged` wrote: survival per layer, whether head and embeddings are one tensor, remarks."""

    survival: tuple[LayerSurvival, ...]
    tied: bool
    notes: tuple[str, ...] = ()


def write_merged(saved: SavedAdapter, folder: Path, *, onto: str, original: str | None, dtype: str) -> Written:
    """Merge and save into `folder`."""
    if onto == ORIGINAL:
        revision = saved.revision if original is None else None
        saved = replace(saved, base=original or saved.base, revision=revision, dtype="float32", quantization=None)
    policy = open_adapter(saved, dtype=saved.dtype if saved.quantization is None else "float32")  # what it rounds to
    survival = fold(policy, getattr(torch, dtype))
    model = policy.unload()
    dequantize(model, getattr(torch, dtype))
    cast_parameters(model, getattr(torch, dtype))
    stated = read_config(saved.base, saved.revision).get_text_config()
    model.config.get_text_config().use_cache = getattr(stated, "use_cache", True)  # training's is off
    model.save_pretrained(folder)
    return Written(survival, is_tied(model))


def _copy_processors(saved: SavedAdapter, folder: Path) -> None:
    """What makes tokens of images stays the base's; without it a merged image-text model would see none."""
    for name in _PROCESSORS:
        file = cached_file(saved.base, name, revision=saved.revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _lineage(saved: SavedAdapter, onto: str, original: str | None) -> Lineage:
    """The adapter's lineage with the adapter itself as the last parent; its base is what it was merged into."""
    before = lineage_of_saved(saved)
    stage = before.stage(saved.folder.resolve().name, sha256(saved.folder / WEIGHTS_FILE), MERGED)
    lineage = replace(before, parents=(*before.parents, stage), lorafocal="")
    if onto == TRAINED:
        return lineage
    if original is not None:
        lineage = replace(lineage, base=BaseIdentity(**base_fingerprint(original)))  # type: ignore[arg-type]
    return replace(lineage, quantization=None)


def _write_papers(folder: Path, lineage: Lineage, report: MergeReport) -> None:
    lineage.write(folder)
    write_atomically(folder / REPORT_FILE, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    card = merged_card(
        lineage,
        dtype=report.dtype,
        gate=report.gate_table(),
        survival=survival_table(report.survival, report.dtype),
        notes=report.notes,
    )
    write_atomically(folder / CARD_FILE, card)


def _check_files(folder: Path) -> None:
    strangers = sorted(
        path.name for path in folder.iterdir() if path.name not in _ALLOWED and not _WEIGHTS.fullmatch(path.name)
    )
    if strangers:
        raise InputError(
            f"the base brings {', '.join(strangers)}, which a merged model may not carry: code and unknown "
            "files are never published unread. Publish the adapter without merging it."
        )
