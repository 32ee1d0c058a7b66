"""Merge an adapter into its base: float32 arithmetic, measured rounding, a gate on held-out pairs, complete
or absent."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lorafocal.card import CARD_FILE, merged_card
from lorafocal.compatibility import MERGES
from lorafocal.data.held_out import HELD_OUT_FILE, load_pairs
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.score import pair_logps
from lorafocal.lineage import LINEAGE_FILE, MERGED, BaseIdentity, Lineage, Stage
from lorafocal.model.adapters import features
from lorafocal.model.head import causal_lm
from lorafocal.model.load import base_fingerprint, check_length, load_base, load_tokenizer
from lorafocal.model.quantized import dequantized_weight, word_of
from lorafocal.model.saved import (
    WEIGHTS_FILE,
    SavedAdapter,
    base_lineage,
    cast_parameters,
    lora_layers,
    open_adapter,
    read_adapter,
    read_config,
)
from lorafocal.objectives.pairwise import PairLogps
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.publish import published, sha256, write_atomically
from lorafocal.reference import DisabledAdapterReference
from lorafocal.release.dequantize import dequantize, float_layer
from lorafocal.release.gate import MAX_DRIFT, GateReport, check, compare

DTYPES = ("bfloat16", "float32")
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

    `quantization` is what the base was quantised to in training; the merge was then into that base de-quantised.
    """

    out: Path
    dtype: str
    base: BaseIdentity
    quantization: str | None
    survival: tuple[LayerSurvival, ...]
    gate: GateReport
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "base": asdict(self.base),
            "base_dequantized_from": self.quantization,
            "gate": self.gate.as_dict(),
            "survival": [asdict(layer) for layer in self.survival],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Survival, gate and notes for a person; the table of all layers is in `merge.json`."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([survival_table(self.survival, self.dtype), self.gate.table(), *notes])


def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    pairs: Path | None = None,
    dtype: str | None = None,
    gate_dtype: str = "float32",
    max_drift: float = MAX_DRIFT,
) -> MergeReport:
    """Merge the adapter folder `adapter` into its base and publish the model as the new folder `out`.

    The base is the one that training saw: where that was quantised, its weights de-quantised again, never the original
    ones and never 4 or 8 bits, which would round most of the adapter away (rows 41, 42).

    `base` overrides where the base is found (`model.saved.read_adapter` has the order). `pairs` are the
    held-out pairs of the gate: preference rows or token ids, by default `held_out.jsonl` of the run. `dtype`
    is what is stored, by default what the run trained in. The gate (`release.gate`) computes in `gate_dtype`;
    bfloat16 halves its memory, and the noise of its arithmetic then counts as drift. `max_drift` is the share of
    the learned effect that may be lost.

    One model is in memory at a time. `out` appears only when complete and through the gate.

    Raises InputError for input that cannot be merged, its subclass GateFailure where the merged model is not
    the adapter any more.
    """
    _check_request(dtype, gate_dtype, max_drift)
    with _enough_memory(), published(out, record=False) as folder:
        saved = read_adapter(adapter, base=base)
        _check_mergeable(saved)
        dtype = dtype or saved.dtype
        tokenizer = load_tokenizer(saved.base, saved.revision)
        held_out = load_pairs(_pairs_file(adapter, pairs), tokenizer, **saved.tokenization)
        live, reference, layout = _live_logps(saved, held_out, gate_dtype)
        survival, tied = _write_model(saved, tokenizer, folder, dtype)
        merged, served = _reloaded_logps(folder, held_out, dtype, gate_dtype, tied, layout)
        gate = compare(
            held_out,
            live=live,
            reference=reference,
            merged=merged,
            served=served,
            dtype=dtype,
            gate_dtype=gate_dtype,
            max_drift=max_drift,
        )
        check(gate)
        lineage = _lineage(saved)
        notes = saved.notes + _base_notes(saved) + _survival_notes(survival, dtype) + _evidence_notes(len(held_out))
        report = MergeReport(out, dtype, lineage.base, saved.quantization, survival, gate, notes)
        _write_papers(folder, lineage, report)
        _check_files(folder)
    return report


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


def _base_notes(saved: SavedAdapter) -> tuple[str, ...]:
    if saved.quantization is None:
        return ()
    inputs = (
        " In training on a GPU an int8 layer also rounds its inputs to 8 bits, which no merged model does: the drift"
        " counts that."
    )
    return (
        f"The adapter was trained on the base quantised to {saved.quantization}, so it was merged into those weights"
        " de-quantised again (what training saw), not into the original ones."
        + inputs
        * (saved.quantization == "int8"),
    )


def _check_mergeable(saved: SavedAdapter) -> None:
    """Refuse what is more than a delta of linear weights, by the compatibility table's word for it."""
    more = sorted(features(saved.config) - MERGES)
    if more:
        raise InputError(
            f"{saved.folder}: the adapter uses {', '.join(more)}, which merge does not fold into a base. Publish the"
            " adapter as it is: PEFT, `lorafocal score` and `adapter.start_from` open it"
        )


def _check_request(dtype: str | None, gate_dtype: str, max_drift: float) -> None:
    for option, value in (("--dtype", dtype), ("--gate-dtype", gate_dtype)):
        if value is not None and value not in DTYPES:
            raise InputError(
                f"{option} {value!r}: choose {' or '.join(DTYPES)} (float16 overflows on weights of either)."
            )
    if not 0 < max_drift < 1:
        raise InputError(
            f"--max-drift {max_drift!r}: give the share of the learned effect that may be lost, in (0, 1)."
        )


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the model does not fit the GPU's memory. Gate in half of it with --gate-dtype bfloat16, or "
            "merge on the CPU by setting CUDA_VISIBLE_DEVICES to nothing."
        ) from error


def _pairs_file(adapter: Path, pairs: Path | None) -> Path:
    if pairs is not None:
        return pairs
    own = adapter.resolve().parent / HELD_OUT_FILE
    if not own.is_file():
        raise InputError(f"no {HELD_OUT_FILE} lies beside {adapter}, so nothing can check the merge: say --pairs FILE.")
    return own


def _live_logps(saved: SavedAdapter, pairs: Sequence[TokenizedPair], dtype: str) -> tuple[PairLogps, PairLogps, str]:
    """Log-probs with the adapter on and off, and the layout that the model computes right in."""
    policy = open_adapter(saved, dtype=dtype)
    check_length(causal_lm(policy), max(pair.longest for pair in pairs))
    layout = choose_layout(policy, "auto").layout
    run = partial(pair_logps, pairs=pairs, device=policy.device, collator=PairCollator(layout))
    return run(partial(sequence_logps, policy)), run(DisabledAdapterReference(policy).logps), layout


def _write_model(
    saved: SavedAdapter, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> tuple[tuple[LayerSurvival, ...], bool]:
    """Merge and save into `folder`; also whether output head and embeddings are one tensor."""
    policy = open_adapter(saved, dtype=saved.dtype if saved.quantization is None else "float32")  # what it rounds to
    survival = fold(policy, getattr(torch, dtype))
    model = policy.unload()
    dequantize(model, getattr(torch, dtype))
    cast_parameters(model, getattr(torch, dtype))
    stated = read_config(saved.base, saved.revision).get_text_config()
    model.config.get_text_config().use_cache = getattr(stated, "use_cache", True)  # training's is off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _copy_processors(saved, folder)
    return survival, _is_tied(model)


def _copy_processors(saved: SavedAdapter, folder: Path) -> None:
    """What makes tokens of images stays the base's; without it a merged image-text model would see none."""
    for name in _PROCESSORS:
        file = cached_file(saved.base, name, revision=saved.revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _reloaded_logps(
    folder: Path, pairs: Sequence[TokenizedPair], dtype: str, gate_dtype: str, tied: bool, layout: str
) -> tuple[PairLogps, PairLogps | None]:
    """Log-probs of the written files in the gate's arithmetic and, where that is finer, in their own."""
    model = load_base(str(folder), dtype=dtype)
    if _is_tied(model) != tied:
        raise InputError(
            "output head and embeddings are tied in the base, but not in the merged model, or the reverse."
        )
    choose_layout(model.eval(), layout)
    run = partial(pair_logps, partial(sequence_logps, model), pairs, device=model.device, collator=PairCollator(layout))
    served = run() if (dtype, gate_dtype) == ("bfloat16", "float32") else None
    cast_parameters(model, getattr(torch, gate_dtype))
    return run(), served


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _lineage(saved: SavedAdapter) -> Lineage:
    """The adapter's lineage, with the adapter itself as the last parent."""
    name, digest = saved.folder.resolve().name, sha256(saved.folder / WEIGHTS_FILE)
    if saved.lineage is not None:
        parents = (*saved.lineage.parents, saved.lineage.stage(name, digest, MERGED))
        return replace(saved.lineage, parents=parents, lorafocal="")
    base = BaseIdentity(**base_fingerprint(saved.base, revision=saved.revision))  # type: ignore[arg-type]  # only the revision is None
    made = base_lineage(saved.base, saved.revision)
    before, origin = ((), None) if made is None else (made.parents, made.first_base)
    parents = (*before, Stage(name, digest))
    return Lineage(base, objective=None, steps=0, pairs_seen=0, reference=None, parents=parents, origin=origin)


def _write_papers(folder: Path, lineage: Lineage, report: MergeReport) -> None:
    lineage.write(folder)
    write_atomically(folder / REPORT_FILE, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    card = merged_card(
        lineage,
        dtype=report.dtype,
        gate=report.gate.table(),
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
