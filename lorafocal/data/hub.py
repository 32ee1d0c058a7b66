"""One source of a config, a file or a data set of the hub, to `Preferences`.

Rows of the hub are data at a fixed commit: no loading script, no branch that moves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafocal.data.places import OnBadRow
from lorafocal.data.readers import EXTENSIONS, extension_of
from lorafocal.data.sources import Pairing, Preferences, preferences_from_rows, read_preferences
from lorafocal.errors import InputError, first_line

HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
REVISION = re.compile(r"[0-9a-f]{40}")


def read_source(
    source: str | Path,
    *,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    split: str | None = None,
    on_bad_row: OnBadRow = "error",
    pairing: Pairing | None = None,
) -> Preferences:
    """Preferences of a file, or of a data set of the hub (`owner/name`) at a commit.

    What exists, or ends in a known extension, is a file. `revision` (40 hex digits) is needed for the hub, `split`
    (default train) may be given there; with a file both are refused. The rest is as in `read_preferences`.
    """
    how: dict[str, Any] = {"form": form, "columns": columns, "on_bad_row": on_bad_row, "pairing": pairing}
    if not is_hub_id(source):
        stray = [name for name, value in (("revision", revision), ("split", split)) if value is not None]
        if stray:
            raise InputError(
                f"{Path(source).name} is a file and has no {' and no '.join(stray)}; remove it, or say it beside the "
                "`path` of the hub id that it belongs to: under data itself it holds for every source (a config that "
                "extends another takes it away by null)"
            )
        return read_preferences(Path(source), **how)
    split = split or "train"
    return preferences_from_rows(load_split(str(source), revision, split), f"{source}[{split}]", **how)


def is_hub_id(source: str | Path) -> bool:
    """Whether a source names a data set of the hub. Raises InputError for what can be neither."""
    path = Path(source)
    if isinstance(source, Path) or extension_of(path) or exists(path):
        return False
    if HUB_ID.fullmatch(source):
        return True
    extensions = ", ".join(EXTENSIONS)
    raise InputError(
        f"{source}: neither a file that exists nor a hub id; a file ends in {extensions}, a hub id is owner/name"
    )


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, for one
        return False


def check_revision(name: str, revision: str | None) -> None:
    """Refuses what is no commit."""
    if revision is None or not REVISION.fullmatch(revision):
        found = "none was given" if revision is None else f"found {revision!r}"
        raise InputError(
            f"{name}: rows of the hub need revision, the 40 hex digits of a commit ({found}): a branch could change "
            "under the run. The data set's page lists its commits; the newest one is printed by: python -c \"from "
            f"huggingface_hub import dataset_info as i; print(i('{name}').sha)\""
        )


def load_split(name: str, revision: str | None, split: str) -> Any:
    """The rows of one split, as a `datasets.Dataset`."""
    check_revision(name, revision)
    from datasets import Dataset, load_dataset  # takes seconds, and files do not need it
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, revision=revision, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        line = first_line(error)
        raise InputError(
            f"{name}, split {split}: it cannot be loaded ({line}); check name, revision and split, and the connection "
            "if it is not in the cache. Data sets with a loading script are not run: export their rows to a file"
        ) from error
    if not isinstance(rows, Dataset):
        raise InputError(f"{name}: split {split!r} is not one list of rows; name one split, such as train")
    return rows
