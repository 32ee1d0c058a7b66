"""A merged model stored in fewer bits: a step of its own after the merge, with a report of what it cost (row 41).

Rounding to 4 bits is far coarser than a preference delta, so no gate is applied: of what was learned much may be
lost. What is left is measured on the merge's pairs, on the files as written, as a stranger loads them.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from lorafocal.card import CARD_FILE, compressed_card
from lorafocal.compatibility import QUANTIZED
from lorafocal.errors import InputError, first_line
from lorafocal.model.head import causal_lm
from lorafocal.model.load import loader_of, local_device
from lorafocal.model.local_places import GENERATION_CONFIG
from lorafocal.model.quantized import MOSTLY, bitsandbytes_config, inner_weights
from lorafocal.model.save_model import INDEX
from lorafocal.model.saved import read_config
from lorafocal.objectives.inputs import PairLogps
from lorafocal.release import verify
from lorafocal.release.gate import GateEvidence, GateReport, compare
from lorafocal.release.merge import MergeReport
from lorafocal.release.package import merged_lineage

FP8 = "fp8"
COMPRESSED = (*QUANTIZED, FP8)
REPORT_FILE = "quantize.json"
_MADE_ANEW = {CARD_FILE, "config.json", GENERATION_CONFIG, INDEX}


@dataclass(frozen=True, slots=True)
class Requantized:
    """What storing in fewer bits did: `before` is the merge's gate, `after` the same numbers of what was written.

    `after` compares with the live adapter too, in the arithmetic that it is served in. Sizes are of weights, in bytes.
    """

    form: str
    before: GateReport
    after: GateReport
    bytes_before: int
    bytes_after: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever serves this must know."""
        if self.after.passed:
            return ()
        return (
            f"stored as {self.form} the model drifts by {self.after.lost:.0%} of the learned effect, where a merge may"
            f" drift by {self.after.max_drift:.0%}: judge by its answers, or serve the merged model",
        )

    def as_dict(self) -> dict[str, Any]:
        """`quantize.json`. There is no verdict in it: nothing was refused."""
        numbers = {key: value for key, value in self.after.as_dict().items() if key not in ("passed", "limit")}
        return {
            "format": 1,
            "stored_as": self.form,
            "merge_drift_rms": self.before.drift_rms,
            **numbers,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def table(self) -> str:
        """Merged and quantised side by side, for a person."""
        one, two = self.before, self.after
        rows = [
            ("", f"merged ({one.dtype})", self.form),
            ("drift from adapter", f"{one.drift_rms:.3g} nats", f"{two.drift_rms:.3g} nats"),
            ("  of what was learned", f"{one.lost:.2%}", f"{two.lost:.2%}"),
            ("margin drift, mean", f"{one.margin_drift_mean:.3g} nats", f"{two.margin_drift_mean:.3g} nats"),
            ("accuracy", f"{one.accuracy_merged:.2%}", f"{two.accuracy_merged:.2%}"),
            ("rank flips", f"{one.rank_flips} of {one.pairs}", f"{two.rank_flips} of {two.pairs}"),
            ("weights", f"{self.bytes_before:,} bytes", f"{self.bytes_after:,} bytes"),
        ]
        return "\n".join(f"{name:<24}{merged:<22}{quantized}".rstrip() for name, merged, quantized in rows)


def requantize(merged: Path, folder: Path, form: str, merge: MergeReport, run: Mapping[str, Any] | None) -> Requantized:
    """Fill `folder` with the merged model of the folder `merged`, stored as `form`, one of COMPRESSED.

    Embeddings, head and norms stay in the merge's dtype. Raises InputError where the library is missing, cannot
    quantise this architecture, or what it wrote gives no finite numbers.
    """
    dtype = getattr(torch, merge.dtype)
    model = _open(merged, dtype, quantization_config=quantizer(form, merge.dtype))
    _check_share(model, form)
    model.save_pretrained(folder)
    del model
    for path in merged.iterdir():
        if path.suffix != ".safetensors" and path.name not in _MADE_ANEW:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile  # a tokenizer may have a folder of templates
            copy(path, folder / path.name)
    cost = Requantized(
        form=form,
        before=merge.gate,
        after=_measured(_open(folder, dtype), merge, form),
        bytes_before=_weight_bytes(merged),
        bytes_after=_weight_bytes(folder),
    )
    text = json.dumps(cost.as_dict(), indent=2, allow_nan=False) + "\n"
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    (folder / CARD_FILE).write_text(_card(cost, merge, merged, run), encoding="utf-8")
    return cost


def _open(folder: Path, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    try:
        return (
            verify.door(folder)
            .from_pretrained(folder, dtype=dtype, use_safetensors=True, device_map={"": local_device()}, **settings)
            .eval()
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(f"this model cannot be stored so ({reason}): export it --as merged") from error


def quantizer(form: str, dtype: str) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers stores weights with; of fp8: float8 weights with a scale a row, inputs in full.

    Raises InputError where the library is missing or does not work.
    """
    if form != FP8:
        return bitsandbytes_config(form, getattr(torch, dtype))
    try:
        settings: Callable[[], Any] = importlib.import_module("torchao.quantization").Float8WeightOnlyConfig
        return TorchAoConfig(quant_type=settings())
    except (ImportError, OSError, AttributeError) as error:
        raise InputError(
            f"--as {FP8} needs torchao, which does not work here ({error}): install it with `pip install"
            " 'lorafocal[fp8]'`, or choose another form"
        ) from error


def _check_share(model: PreTrainedModel, form: str) -> None:
    """Refuse a model most of which stayed as it was: no library here takes experts that are kept in one tensor."""
    text = causal_lm(model)
    sizes, modules = inner_weights(text), dict(text.named_modules())
    held = sum(
        size for name, size in sizes.items() if name in modules and type(modules[name].weight) is not nn.Parameter
    )
    if held < MOSTLY * sum(sizes.values()):
        raise InputError(
            f"--as {form}: only {held / sum(sizes.values()):.0%} of the inner weights of {type(text).__name__} can be"
            " stored so (experts kept in one tensor cannot): export it --as merged"
        )


def _measured(model: PreTrainedModel, merge: MergeReport, form: str) -> GateReport:
    """Log-probs as whoever loads the folder gets them; bitsandbytes says at each layer that int8 rounds its inputs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # such a CPU would compute in bf16, as no GPU does
            layer.support_avx512bf16_for_cpu = False
    evidence: GateEvidence = merge.evidence
    chosen = [verify.logp(model, [*p.prompt_ids], [*p.chosen_ids], p.chosen_turns) for p in evidence.pairs]
    rejected = [verify.logp(model, [*p.prompt_ids], [*p.rejected_ids], p.rejected_turns) for p in evidence.pairs]
    report = compare(
        evidence.pairs,
        live=evidence.live,
        reference=evidence.reference,
        merged=PairLogps(torch.tensor(chosen), torch.tensor(rejected)),
        served=None,
        dtype=form,
        gate_dtype=merge.dtype,
        max_drift=merge.gate.max_drift,
    )
    if not math.isfinite(report.drift_rms):
        raise InputError(f"stored as {form} the model gives log-probs that are not finite: choose another form")
    return report


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(cost: Requantized, merge: MergeReport, merged: Path, run: Mapping[str, Any] | None) -> str:
    library = "torchao" if cost.form == FP8 else "bitsandbytes"
    loader = loader_of(read_config(str(merged)))
    return compressed_card(
        merged_lineage(merged),
        title=f"{cost.form} with {library}",
        loading=(
            f"With `pip install {library}`:\n\n"
            f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
            f'model = {loader}.from_pretrained("THIS_MODEL", dtype="{merge.dtype}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")\n```'
        ),
        measured={
            f"What {cost.form} cost": cost.table(),
            "Did the merged model do what the adapter did?": merge.gate_table(),
        },
        notes=[*merge.notes, *cost.notes],
        loader=loader,
        run=run,
    )
