"""What was trained, in the form that somebody else needs: one folder, complete or absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lorafocal.errors import InputError
from lorafocal.model.saved import read_adapter
from lorafocal.publish import published
from lorafocal.release.merge import MergeReport, merge_adapter
from lorafocal.release.package import package_adapter

BUNDLE, MERGED, ADAPTER, GGUF = "bundle", "merged", "adapter", "gguf"
FORMS = (MERGED, ADAPTER)


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


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export left: the files in `folder` with their bytes, the merge within, and what is worth saying."""

    form: str
    folder: Path
    files: dict[str, int]
    merge: MergeReport | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `--json`; it names no folder of this machine."""
        return {
            "form": self.form,
            "files": self.files,
            "merge": None if self.merge is None else self.merge.as_dict(),
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """For a person: the merge's own table, the files, the notes."""
        merge = [] if self.merge is None else [self.merge.table()]
        files = [f"  {size:>13,} bytes  {name}" for name, size in self.files.items()]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*merge, f"{self.form}: {len(files)} files", *files, *notes])


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

    Raises InputError for an option that the form does not have, for input that cannot be released, and, as its
    subclass GateFailure, where a merged model is not the adapter any more; then nothing is left behind.
    """
    _check_form(form)
    adapters = [adapter] if isinstance(adapter, Path) else list(adapter)
    if form == MERGED:
        merge = merge_adapter(adapters, out, **merging)
        return ExportReport(form, out, files_of(out), merge)
    with published(out, record=False) as folder:
        base = merging.get("base")
        package_adapter([read_adapter(one, base=base) for one in adapters], merging.get("weights"), folder)
    return ExportReport(form, out, files_of(out))


def files_of(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder`, by its name from there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise InputError(f"--as {form!r} is unknown: choose one of {', '.join(FORMS)}")
