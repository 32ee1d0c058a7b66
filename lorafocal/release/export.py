"""What was trained, in the form that somebody else needs: one folder, complete or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lorafocal.card import CARD_FILE, compressed_card
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE
from lorafocal.model.load import loader_of
from lorafocal.model.saved import SavedAdapter, read_adapter, read_config
from lorafocal.publish import published
from lorafocal.release.bundle import write_bundle
from lorafocal.release.files import files_in
from lorafocal.release.gguf import LOSSLESS, Converted, check_converter, convert
from lorafocal.release.merge import REPORT_FILE, MergeReport, merge_adapter
from lorafocal.release.package import merged_lineage, package_adapter
from lorafocal.release.requantize import COMPRESSED, Requantized, quantizer, requantize
from lorafocal.release.verify import PAIRS
from lorafocal.run_folder import read_manifest, run_of

BUNDLE, MERGED, ADAPTER, GGUF = "bundle", "merged", "adapter", "gguf"
FORMS = (BUNDLE, MERGED, ADAPTER, *COMPRESSED, GGUF)


class MergeOptions(TypedDict, total=False):
    """The options of `merge_adapter`, which every form but the adapter itself goes through."""

    weights: Sequence[float] | None
    onto: str
    original: str | None
    base: str | None
    pairs: Path | None
    dtype: str | None
    gate_dtype: str
    max_drift: float


_OF_AN_ADAPTER = ("base", "weights")
_SAYS_NOTHING = {"onto": "auto", "gate_dtype": "float32"}  # beside None


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export left: the files in `folder` with their bytes, and what was measured on the way.

    `merge` is None for an adapter alone; `digest` is a bundle's.
    """

    form: str
    folder: Path
    files: Mapping[str, int]
    merge: MergeReport | None = None
    quantized: Requantized | None = None
    converted: Converted | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `--json`; it names no folder of this machine."""
        parts = {"merge": self.merge, "quantized": self.quantized, "converted": self.converted}
        return {
            "form": self.form,
            "files": dict(self.files),
            **{name: None if part is None else part.as_dict() for name, part in parts.items()},
            "digest": self.digest,
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """For a person: what was measured, the files, the digest, the notes."""
        measured = [part.table() for part in (self.merge, self.quantized) if part is not None]
        files = [f"  {size:>15,} bytes  {name}" for name, size in self.files.items()]
        digest = [] if self.digest is None else [f"digest of the bundle (announce it)  {self.digest}"]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*measured, f"exported as {self.form}, {len(files)} files", *files, *digest, *notes])


def export(
    adapter: Path | Sequence[Path],
    out: Path,
    *,
    form: str = BUNDLE,
    converter: Path | None = None,
    outtype: str | None = None,
    **merging: Unpack[MergeOptions],
) -> ExportReport:
    """Write the adapter folder `adapter`, or several summed by `weights`, as the new folder `out` in one of FORMS.

    `merging` are the options of `merge_adapter`; an adapter alone takes `base` and `weights` of them. `converter` and
    `outtype` belong to GGUF.

    Raises InputError for an option that the form does not have and for input that cannot be released, and its subclass
    GateFailure where a merged model is not the adapter any more; then nothing is left behind.
    """
    _check_request(form, converter, outtype, merging)
    source = _Source([adapter] if isinstance(adapter, Path) else list(adapter), merging)
    if form == MERGED:
        made: dict[str, Any] = {"merge": source.merge(out)}
    else:
        with published(out, record=False) as folder:
            if form == ADAPTER:
                saved = source.saved()
                package_adapter(saved, source.weights, folder)
                made = {"notes": tuple(note for one in saved for note in one.notes)}
            elif form == BUNDLE:
                made = _bundle(source, folder)
            elif converter is not None:
                made = _gguf(source, folder, converter, outtype, _model_name(out))
            else:
                made = _compressed(source, folder, form)
    sizes = {name: path.stat().st_size for name, path in files_in(out).items()}
    return ExportReport(form, out, sizes, **made)


@dataclass(frozen=True, slots=True)
class _Source:
    """The adapters to export, and how they are merged."""

    adapters: Sequence[Path]
    merging: MergeOptions

    @property
    def weights(self) -> Sequence[float] | None:
        return self.merging.get("weights")

    def saved(self) -> list[SavedAdapter]:
        return [read_adapter(one, base=self.merging.get("base")) for one in self.adapters]

    def merge(self, folder: Path) -> MergeReport:
        return merge_adapter(self.adapters, folder, **self.merging)

    def run(self) -> Mapping[str, Any] | None:
        """The manifest of the one run behind all of it."""
        return read_manifest(run_of(self.adapters[0])) if len(self.adapters) == 1 else None


def _bundle(source: _Source, folder: Path) -> dict[str, Any]:
    merge, digest = write_bundle(source.saved(), source.weights, folder, source.merge, source.run())
    pairs = (
        f"{PAIRS} holds the gate's {merge.gate.pairs} held-out pairs as token ids, which the tokenizer turns back into"
        " text: --push leaves it out unless --with-pairs"
    )
    return {"merge": merge, "digest": digest, "notes": (pairs,)}


def _compressed(source: _Source, folder: Path, form: str) -> dict[str, Any]:
    merge = source.merge(folder / MERGED)
    quantized = requantize(folder / MERGED, folder, form, merge, source.run())
    shutil.rmtree(folder / MERGED)
    return {"merge": merge, "quantized": quantized, "notes": quantized.notes}


def _gguf(source: _Source, folder: Path, converter: Path, outtype: str | None, name: str) -> dict[str, Any]:
    model = folder / MERGED
    merge = source.merge(model)
    converted = convert(model, folder, converter, name=name, dtype=merge.dtype, outtype=outtype)
    notes: tuple[str, ...] = ()
    if converted.outtype != LOSSLESS[merge.dtype]:
        notes = (
            f"the converter stored {merge.dtype} weights as {converted.outtype}; what that changed was not measured:"
            " nothing here reads GGUF",
        )
    card = compressed_card(
        merged_lineage(model),
        title=f"GGUF ({converted.outtype})",
        loading=f"```bash\nllama-cli -m {converted.name}\n```",
        measured={"Did the merged model do what the adapter did?": merge.gate_table()},
        notes=[*merge.notes, *notes],
        loader=loader_of(read_config(str(model))),
        run=source.run(),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    for paper in (REPORT_FILE, LINEAGE_FILE):
        shutil.copyfile(model / paper, folder / paper)
    shutil.rmtree(model)
    return {"merge": merge, "converted": converted, "notes": notes}


def _model_name(out: Path) -> str:
    """The last name of the output folder, as a file and a model may be called."""
    return re.sub(r"[^\w.-]+|^[.-]+", "-", out.name, flags=re.ASCII).strip("-.") or "model"


def _check_request(form: str, converter: Path | None, outtype: str | None, merging: MergeOptions) -> None:
    """Refuse what can be known to fail before anything is loaded."""
    if form not in FORMS:
        raise InputError(f"--as {form!r} is unknown: choose one of {', '.join(FORMS)}")
    if form == GGUF:
        check_converter(converter, outtype)
    elif converter is not None or outtype is not None:
        raise InputError(f"--converter and --outtype go with --as {GGUF}: leave them out")
    if form in COMPRESSED:
        quantizer(form, "float32")
    if form == ADAPTER:
        given = {name: value for name, value in merging.items() if value not in (None, _SAYS_NOTHING.get(name))}
        if strange := sorted(given.keys() - set(_OF_AN_ADAPTER)):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
            raise InputError(f"--as {ADAPTER} merges nothing and has no use for {options}: leave it out")
