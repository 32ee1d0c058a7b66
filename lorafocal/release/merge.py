"""Merge an adapter into its base: float32 arithmetic, measured rounding, a gate on held-out pairs, complete
or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafocal.card import CARD_FILE, merged_card
from lorafocal.data.held_out import HELD_OUT_FILE, load_pairs
from lorafocal.errors import InputError
from lorafocal.lineage import MERGED, BaseIdentity, Lineage
from lorafocal.model.base_config import config_sha256
from lorafocal.model.load import DTYPES as GATE_DTYPES
from lorafocal.model.load import base_fingerprint, loader_of, stated_sha256, weight_files
from lorafocal.model.save_model import PROCESSORS, copy_of_base
from lorafocal.model.saved import TEMPLATE_FILE, WEIGHTS_FILE, SavedAdapter, read_adapter, read_config, tokenizer_of
from lorafocal.publish import published, sha256, write_atomically
from lorafocal.release.combine import combine, lineage_of_saved
from lorafocal.release.files import strangers
from lorafocal.release.gate import MAX_DRIFT, GateEvidence, GateReport, check, compare, gate_table
from lorafocal.release.measure import Live, live_logps, merged_logps
from lorafocal.release.measured import check_measured, check_tokenizer
from lorafocal.release.onto import AUTO, ORIGINAL, TRAINED, Measured, bases_to_try, least_drift, why_kept
from lorafocal.release.rounding import DTYPES
from lorafocal.release.survival import LayerSurvival, survival_notes, survival_table
from lorafocal.release.weights import write_merged
from lorafocal.run_folder import read_manifest, run_of

FEW_PAIRS = 20  # below this the gate says little
REPORT_FILE = "merge.json"


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
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    onto: str = AUTO,
    original: str | None = None,
    base: str | None = None,
    pairs: str | Path | None = None,
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
    out = Path(out)
    with published(out, record=False) as folder:
        folders = [Path(one) for one in ([adapter] if isinstance(adapter, str | Path) else adapter)]
        saved = _one_adapter(folders, weights, base, folder)
        bases = bases_to_try(saved, onto, original)
        dtype = dtype or saved.dtype
        tokenizer = tokenizer_of(saved)
        for one in folders:
            check_tokenizer(one, tokenizer)
        held_out = load_pairs(_pairs_file(folders[0], pairs), tokenizer, **saved.tokenization).pairs
        live = live_logps(saved, held_out, gate_dtype)
        check_measured(saved, live)
        tried = [
            _write_and_measure(saved, live, folder / choice, original=original, dtype=dtype, max_drift=max_drift)
            for choice in bases
        ]
        kept = least_drift(tried)
        check(kept.gate, *_other_base(kept, bases, saved))
        lineage = _lineage(saved, kept.onto, original)
        whose = ("the gate's pairs are those of the first adapter's run",) if len(folders) > 1 and pairs is None else ()
        told = saved.notes + whose + _spoken(saved) + live.notes
        notes = told + why_kept(kept, tried, saved) + kept.written.notes + kept.merged.notes
        report = MergeReport(
            out=out,
            dtype=dtype,
            base=lineage.base,
            quantization=saved.quantization,
            onto=kept.onto,
            survival=kept.written.survival,
            gate=kept.gate,
            gates={one.onto: one.gate for one in tried},
            evidence=live.evidence(kept.merged.logps),
            notes=notes + survival_notes(kept.written.survival, dtype) + _evidence_notes(kept.gate),
        )
        _keep_only(kept.folder, folder)
        tokenizer.save_pretrained(folder)
        copy_of_base(PROCESSORS, saved.base, saved.revision, folder)
        _write_papers(folder, lineage, report, read_manifest(run_of(folders[0])) if len(folders) == 1 else None)
        _check_files(folder)
    return report


def _one_adapter(
    folders: Sequence[Path], weights: Sequence[float] | None, base: str | None, place: Path
) -> SavedAdapter:
    """The adapter to merge: the one there is, or the weighted sum of several, written into `place`."""
    adapters = [read_adapter(folder, base=base) for folder in folders]
    _check_downloaded(adapters[0])
    if len(adapters) == 1 and weights is None:
        return adapters[0]
    combined = place / "combined"
    combined.mkdir()
    combine(adapters, [1.0] * len(adapters) if weights is None else weights, combined)
    first = adapters[0]
    if (first.folder / TEMPLATE_FILE).is_file():
        shutil.copyfile(first.folder / TEMPLATE_FILE, combined / TEMPLATE_FILE)
    one = read_adapter(combined, base=first.base)
    return replace(one, revision=first.revision, tokenization=first.tokenization, notes=first.notes)


def _check_downloaded(saved: SavedAdapter) -> None:
    """Read a hub's files to their end: their names are their digests, which `read_adapter` believes."""
    for file in weight_files(saved.base, saved.revision):
        if (stated := stated_sha256(file)) is not None and sha256(file) != stated:
            raise InputError(
                f"{saved.base}: {file.name} is not what was downloaded (its sha256 is not {stated}, its name in the"
                " cache): a disk or a program changed it. Delete it there and download it again"
            )


def _write_and_measure(
    saved: SavedAdapter, live: Live, folder: Path, *, original: str | None, dtype: str, max_drift: float
) -> Measured:
    """Merge into the base that `folder` is named after, and hold what was written against the live adapter."""
    onto = folder.name
    folder.mkdir()
    written = write_merged(saved, folder, onto=onto, original=original, dtype=dtype)
    merged = merged_logps(folder, live, dtype=dtype, tied=written.tied)
    gate = compare(
        live.pairs,
        live=live.logps,
        reference=live.reference,
        merged=merged.logps,
        served=merged.served,
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


def _evidence_notes(gate: GateReport) -> tuple[str, ...]:
    notes = []
    if gate.pairs < FEW_PAIRS:
        notes.append(
            f"the gate saw {gate.pairs} held-out pairs only, which may miss what a merge broke; give more by --pairs"
        )
    if gate.blind:
        notes.append(
            f"on these pairs the adapter is {gate.learned_rms:.2g} nats a sequence away from its base, which is no more"
            " than rounding, so that the base itself would pass the gate: it shows nothing of what was learned. Give"
            " pairs on which the adapter acts by --pairs, or train longer"
        )
    return tuple(notes)


def _check_request(dtype: str | None, gate_dtype: str, max_drift: float) -> None:
    for option, value, known in (("--dtype", dtype, DTYPES), ("--gate-dtype", gate_dtype, GATE_DTYPES)):
        if value is not None and value not in known:
            raise InputError(f"{option} {value!r}: choose one of {', '.join(known)}.")
    if not 0 < max_drift < 1:
        raise InputError(
            f"--max-drift {max_drift!r}: give the share of the learned effect that may be lost, in (0, 1)."
        )


def _pairs_file(adapter: Path, pairs: str | Path | None) -> Path:
    if pairs is not None:
        return Path(pairs)
    own = run_of(adapter) / HELD_OUT_FILE
    if not own.is_file():
        raise InputError(f"no {HELD_OUT_FILE} lies beside {adapter}, so nothing can check the merge: say --pairs FILE.")
    return own


def _lineage(saved: SavedAdapter, onto: str, original: str | None) -> Lineage:
    """The adapter's lineage with the adapter itself as the last parent; its base is what it was merged into."""
    before = lineage_of_saved(saved)
    stage = before.stage(saved.folder.resolve().name, sha256(saved.folder / WEIGHTS_FILE), MERGED)
    lineage = replace(before, parents=(*before.parents, stage), lorafocal="")
    if onto == TRAINED:
        return lineage
    if original is not None:
        base = BaseIdentity(**base_fingerprint(original))  # type: ignore[arg-type]
        lineage = replace(lineage, base=base, base_config_sha256=config_sha256(read_config(original)))
    return replace(lineage, quantization=None)


def _write_papers(folder: Path, lineage: Lineage, report: MergeReport, run: Mapping[str, Any] | None) -> None:
    lineage.write(folder)
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / REPORT_FILE, text)
    card = merged_card(
        lineage,
        dtype=report.dtype,
        gate=report.gate_table(),
        survival=survival_table(report.survival, report.dtype),
        notes=report.notes,
        loader=loader_of(read_config(str(folder))),
        run=run,
    )
    write_atomically(folder / CARD_FILE, card)


def _spoken(saved: SavedAdapter) -> tuple[str, ...]:
    """What no file of a model holds: how the run had its chat template render prompts."""
    options = saved.tokenization.get("chat_template_kwargs")
    if not options:
        return ()
    said = json.dumps(options, ensure_ascii=False)
    return (f"prompts were rendered with chat_template_kwargs {said}: give them wherever this model is asked",)


def _check_files(folder: Path) -> None:
    if strange := strangers(folder):  # row 52
        raise InputError(
            f"the base brings {', '.join(strange)}, which a merged model may not carry: code and unknown "
            "files are never published unread. Publish the adapter without merging it."
        )
