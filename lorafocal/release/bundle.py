"""A release bundle: adapter, merged model, the gate's evidence and a script with which a stranger checks all of it."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lorafocal.card import CARD_FILE, bundle_card
from lorafocal.data.held_out import write_held_out
from lorafocal.model.load import loader_of
from lorafocal.model.saved import SavedAdapter, read_config
from lorafocal.publish import sha256
from lorafocal.release import verify
from lorafocal.release.files import files_in
from lorafocal.release.gate import GateEvidence
from lorafocal.release.merge import MergeReport
from lorafocal.release.package import merged_lineage, package_adapter
from lorafocal.release.survival import survival_table
from lorafocal.versions import __version__

GATE_FILE, MANIFEST_FILE = "gate.json", "manifest.json"
RULE = f"rms(merged - live) <= max_drift * rms(live - reference) + {verify.NOISE:g} * rms(live)"


def write_bundle(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float] | None,
    folder: Path,
    merge: Callable[[Path], MergeReport],
    run: Mapping[str, Any] | None,
) -> tuple[MergeReport, str]:
    """Fill the empty `folder` with a bundle; `merge` writes the merged model into the folder that it is given,
    and `run` is the manifest of the run that trained it, for the card.

    Returns the merge's report and the digest of the bundle: the sha256 of its manifest, which names every other file by
    its own.
    """
    report = merge(folder / "merged")
    (folder / "adapter").mkdir()
    package_adapter(adapters, weights, folder / "adapter")
    numbered = [replace(pair, id=str(number)) for number, pair in enumerate(report.evidence.pairs, start=1)]
    write_held_out(folder / verify.PAIRS, numbered)  # their own ids may name a user's file
    _write_json(folder / GATE_FILE, gate_record(report))
    (folder / CARD_FILE).write_text(_card(folder / "merged", report, run), encoding="utf-8")
    shutil.copyfile(Path(verify.__file__), folder / "verify.py")
    _write_json(folder / MANIFEST_FILE, manifest_of(folder))
    return report, sha256(folder / MANIFEST_FILE)


def gate_record(report: MergeReport) -> dict[str, Any]:
    """`gate.json`: the rule, its result, and of each pair the log-probs [chosen, rejected] in nats."""
    evidence = report.evidence
    return {
        "format": 1,
        "rule": RULE,
        "max_drift": report.gate.max_drift,
        "dtype": report.dtype,
        "gate_dtype": evidence.dtype,
        "result": report.gate.as_dict(),
        "logps": _by_pair(evidence),
    }


def _by_pair(evidence: GateEvidence) -> list[dict[str, list[float]]]:
    sides = {who: getattr(evidence, who) for who in ("live", "reference", "merged")}
    columns = {who: torch.stack((logps.chosen, logps.rejected), dim=1).tolist() for who, logps in sides.items()}
    return [{who: columns[who][row] for who in columns} for row in range(len(evidence.pairs))]


def manifest_of(folder: Path) -> dict[str, Any]:
    """`manifest.json` of the files that `folder` holds now, but itself."""
    files = {name: path for name, path in files_in(folder).items() if name != MANIFEST_FILE}
    return {
        "format": 1,
        "lorafocal": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()},
    }


def _card(merged: Path, report: MergeReport, run: Mapping[str, Any] | None) -> str:
    return bundle_card(
        merged_lineage(merged),
        dtype=report.dtype,
        gate=report.gate_table(),
        survival=survival_table(report.survival, report.dtype),
        pairs=len(report.evidence.pairs),
        notes=report.notes,
        loader=loader_of(read_config(str(merged))),
        run=run,
    )


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
